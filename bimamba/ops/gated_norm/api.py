"""The public norm: validation, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose_backend, expect_device
from .reference import rms_norm_gated_reference

BACKENDS = ("auto", "triton", "torch")
MAX_GROUP = 16384  # channels that a program of the kernels holds


def rms_norm_gated(
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    norm_before_gate: bool = True,
    group_size: int | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`RMSNorm(y) * SiLU(z)`, or `RMSNorm(y * SiLU(z))` with `norm_before_gate=False`; computed in float32 at least.

    Args:
        y, z: `(..., d)`, of any number of rows; z None: no gate. Rows of z may lie apart, as those of a slice of
            channels do. weight: `(d)`.
        group_size: normalise groups of that many channels by themselves (Zhang and Sennrich 2019, arXiv:1910.07467,
            for the norm; Dao and Gu 2024, arXiv:2405.21060, for gate and groups).
        backend: "auto" (Triton on GPUs that have it, else torch), "triton" or "torch"; `BIMAMBA_BACKEND` replaces
            "auto".
        dtype: of the result.

    Returns:
        `(..., d)` in `dtype`, by default that of `y`.

    Raises:
        ValueError: shapes or devices that do not fit, or `d` is not a multiple of `group_size`.
    """
    d = y.shape[-1]
    if group_size is not None and (group_size < 1 or d % group_size):
        raise ValueError(f"group_size: expected a divisor of {d}, got {group_size}")
    if tuple(weight.shape) != (d,):
        raise ValueError(f"weight: expected shape (d) = ({d},), got {tuple(weight.shape)}")
    if z is not None and z.shape != y.shape:
        raise ValueError(f"z: expected the shape of y, {tuple(y.shape)}, got {tuple(z.shape)}")
    expect_device("y", y, z=z, weight=weight)
    size = group_size or d

    def refusal() -> str | None:
        if y.dtype == torch.float64:
            return "the kernels compute in float32, and y is float64"
        return f"the norm's kernels take groups up to {MAX_GROUP} channels, got {size}" if size > MAX_GROUP else None

    if choose_backend(y, backend, BACKENDS, refusal) == "torch":
        return rms_norm_gated_reference(y, z, weight, eps, norm_before_gate, size).to(dtype or y.dtype)
    from .binding import gated_norm

    return gated_norm(y, z, weight, eps, norm_before_gate, size, dtype)
