"""RMS normalisation with a gate, the last step of a Mamba-2 block before its output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_gated(
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    norm_before_gate: bool = True,
    group_size: int | None = None,
) -> Tensor:
    """`RMSNorm(y) * SiLU(z)`, or `RMSNorm(y * SiLU(z))` with `norm_before_gate=False`; computed in float32 at least.

    Args:
        y, z: `(..., d)`; z None: no gate. weight: `(d)`.
        group_size: normalise groups of that many channels by themselves (Zhang and Sennrich 2019, arXiv:1910.07467,
            for the norm; Dao and Gu 2024, arXiv:2405.21060, for gate and groups).

    Returns:
        `(..., d)` in the dtype of `y`.

    Raises:
        ValueError: `d` is not a multiple of `group_size`.
    """
    d = y.shape[-1]
    if group_size is not None and d % group_size:
        raise ValueError(f"group_size: expected a divisor of {d}, got {group_size}")
    dtype = torch.promote_types(y.dtype, torch.float32)
    out = y.to(dtype)
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        out = out * gate
    size = group_size or d
    out = F.rms_norm(out.unflatten(-1, (-1, size)), (size,), eps=eps).flatten(-2) * weight.to(dtype)
    if gate is not None and norm_before_gate:
        out = out * gate
    return out.to(y.dtype)
