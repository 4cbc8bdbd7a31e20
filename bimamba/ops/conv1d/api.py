"""Depthwise convolution over the length with an activation, channels last, as Mamba blocks use it before the scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "none": lambda x: x}


def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    causal: bool = False,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """`y[i] = act(bias + sum_k weight[:, k] x[i + k - left])`, zeros beyond the ends, with `left = (width - 1) // 2`.

    Args:
        x: `(b, l, d)`. weight: `(d, width)`. bias: `(d)`.
        activation: "silu" ("swish" is the same) or "none".
        causal: only look back, `left = width - 1`.
        mask: `(b, l)` bool, False where a token is padding: it is read as zero.
        seq_idx: `(b, l)` ints: neighbours of another value are read as zero (several sequences in a row).

    Returns:
        `(b, l, d)`. Outputs at padding are not meaningful.

    Raises:
        ValueError: sizes that do not fit, or an unknown activation.
    """
    d, width = weight.shape
    if x.dim() != 3 or x.shape[-1] != d:
        raise ValueError(f"x: expected (b, l, d) with d = {d} as of weight, got {tuple(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
    for name, value in (("mask", mask), ("seq_idx", seq_idx)):
        if value is not None and value.shape != x.shape[:2]:
            raise ValueError(f"{name}: expected shape (b, l) = {tuple(x.shape[:2])}, got {tuple(value.shape)}")
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0.0)
    left = width - 1 if causal else (width - 1) // 2
    if seq_idx is None:
        x = F.pad(x, (0, 0, left, width - 1 - left)).transpose(1, 2)
        y = F.conv1d(x, weight[:, None], bias, groups=d).transpose(1, 2)
    else:
        y = _taps(x, weight, bias, left, seq_idx)
    return ACTIVATIONS[activation](y)


def _taps(x: Tensor, weight: Tensor, bias: Tensor | None, left: int, seq_idx: Tensor) -> Tensor:
    """One multiplication a tap, so that each tap can be masked by where it comes from."""
    width, l = weight.shape[1], x.shape[1]
    weight = weight.to(x.dtype)
    x = F.pad(x, (0, 0, left, width - 1 - left))
    index = F.pad(seq_idx.long(), (left, width - 1 - left), value=-1)
    y = x.new_zeros(()) if bias is None else bias.to(x.dtype)
    for k in range(width):
        same = (index[:, k : k + l] == seq_idx)[..., None]
        y = y + torch.where(same, x[:, k : k + l], 0.0) * weight[:, k]
    return y
