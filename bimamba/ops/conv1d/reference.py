"""The convolution in PyTorch, on any device and dtype: the CPU's path, and what the kernels are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "none": lambda x: x}


def taps_before(width: int, causal: bool) -> int:
    """How many rows before its own a row reads."""
    return width - 1 if causal else (width - 1) // 2


def conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    causal: bool,
    mask: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """See `api.depthwise_conv1d`."""
    d, width = weight.shape
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0.0)
    left = taps_before(width, causal)
    # Compiled, by taps: Inductor fuses them, and cannot yet sort the strides of the other form for a symbolic length
    if seq_idx is None and not torch.compiler.is_compiling():
        x = F.pad(x, (0, 0, left, width - 1 - left)).transpose(1, 2)
        y = F.conv1d(x, weight[:, None], bias, groups=d).transpose(1, 2)
    else:
        y = _taps(x, weight, bias, left, seq_idx)
    return ACTIVATIONS[activation](y)


def _taps(x: Tensor, weight: Tensor, bias: Tensor | None, left: int, seq_idx: Tensor | None) -> Tensor:
    """One multiplication a tap, so that each tap can be masked by where it comes from."""
    width, l = weight.shape[1], x.shape[1]
    weight = weight.to(x.dtype)
    x = F.pad(x, (0, 0, left, width - 1 - left))
    if seq_idx is not None:
        index = F.pad(seq_idx.long(), (left, width - 1 - left), value=-1)
    y = x.new_zeros(()) if bias is None else bias.to(x.dtype)
    for k in range(width):
        rows = x[:, k : k + l]
        if seq_idx is not None:
            rows = torch.where((index[:, k : k + l] == seq_idx)[..., None], rows, 0.0)
        y = y + rows * weight[:, k]
    return y
