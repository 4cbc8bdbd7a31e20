"""The public convolution: validation, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose_backend, expect_bool, expect_device
from .reference import ACTIVATIONS, conv1d_reference

BACKENDS = ("auto", "triton", "torch")
MAX_WIDTH = 9  # of the kernels, which unroll the taps
MAX_PARTS = 5


def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    causal: bool = False,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    split: tuple[int, ...] | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """`y[i] = act(bias + sum_k weight[:, k] x[i + k - left])`, zeros beyond the ends, with `left = (width - 1) // 2`.

    The convolution before the scan of a Mamba block (Gu and Dao 2023, arXiv:2312.00752), channels last: no transposes.

    Args:
        x: `(b, l, d)`, bf16, fp16, fp32 (or fp64, in PyTorch). Rows may lie apart, as those of a slice of channels do;
            b may be 0.
        weight: `(d, width)`. bias: `(d)`. Any float dtype; the Triton kernels compute in float32.
        activation: "silu" ("swish" is the same) or "none".
        causal: only look back, `left = width - 1`.
        mask: `(b, l)` bool, False where a token is padding: it is read as zero.
        seq_idx: `(b, l)` ints: neighbours of another value are read as zero (several sequences in a row).
        split: sizes that sum to d: the channels come back in so many tensors, each contiguous on a GPU.
        backend: "auto" (Triton on GPUs that have it, else torch), "triton" or "torch"; `BIMAMBA_BACKEND` replaces
            "auto".

    Returns:
        `(b, l, d)` in the dtype of x (that of autocast on the torch path), or a tuple of `(b, l, size)`. Outputs at
        padding are not meaningful.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit, or an unknown activation.
    """
    d, width = weight.shape
    if x.dim() != 3 or x.shape[-1] != d or x.shape[1] < 1:  # PyTorch's convolution refuses l = 0, too
        raise ValueError(f"x: expected (b, l, d) with d = {d} as of weight and l at least 1, got {tuple(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
    if bias is not None and tuple(bias.shape) != (d,):
        raise ValueError(f"bias: expected shape (d) = ({d},), got {tuple(bias.shape)}")
    expect_bool(mask)
    if seq_idx is not None and (seq_idx.dtype == torch.bool or seq_idx.is_floating_point()):
        raise ValueError(f"seq_idx: expected ints, got {seq_idx.dtype}")
    for name, value in (("mask", mask), ("seq_idx", seq_idx)):
        if value is not None and value.shape != x.shape[:2]:
            raise ValueError(f"{name}: expected shape (b, l) = {tuple(x.shape[:2])}, got {tuple(value.shape)}")
    expect_device("x", x, weight=weight, bias=bias, mask=mask, seq_idx=seq_idx)
    if split is not None and (sum(split) != d or min(split) < 1):
        raise ValueError(f"split: expected positive sizes that sum to d = {d}, got {split}")

    def refusal() -> str | None:
        if x.dtype == torch.float64:
            return "the kernels compute in float32, and x is float64"
        if width > MAX_WIDTH:
            return f"the convolution's kernels take widths up to {MAX_WIDTH}, got {width}"
        if split is not None and len(split) > MAX_PARTS:
            return f"the convolution's kernels split into up to {MAX_PARTS} parts, got {len(split)}"
        return None

    if choose_backend(x, backend, BACKENDS, refusal) == "torch":
        y = conv1d_reference(x, weight, bias, activation, causal, mask, seq_idx)
        return y if split is None else y.split(list(split), dim=-1)
    from .binding import conv1d

    out = conv1d(x, weight, bias, activation != "none", causal, mask, seq_idx, list(split or (d,)))
    return out[0] if split is None else tuple(out)
