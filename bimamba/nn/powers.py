"""Convolutions along the sequence with taps at 0 and at powers of two to both sides: few taps that see far.

As in WaveNet and MultiresNet (Shi et al. 2023, arXiv:2305.01638). Where an image's rows are as long as a power of two,
one of the places is that above.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def powers(reach: int) -> list[int]:
    """..., -2, -1, 0, 1, 2, ... up to `reach` rounded down to a power of two; 0: that place alone."""
    ahead = [2**k for k in range(reach.bit_length())]
    return [*(-p for p in reversed(ahead)), 0, *ahead]


def _shifted(x: Tensor, taps: list[int], stride: int = 1) -> list[Tensor]:
    """`x (b, l, c)` as each tap sees it, zero beyond the ends; every `stride`-th row."""
    l, reach = x.shape[1], taps[-1]
    padded = F.pad(x, (0, 0, reach, reach))
    return [padded[:, reach + tap : reach + tap + l : stride] for tap in taps]


class PowersConv1d(nn.Module):
    """`(b, l, c)` to `(b, ceil(l / stride), d)`; outside of the sequence are zeros.

    As a product of the weights with the shifted copies side by side: eleven or thirteen taps instead of 33 or 65, and
    no convolution whose dilation or stride cuDNN has no fast gradient for.

    Args:
        inputs, outputs: channels c and d. reach: of the farthest tap, see `powers`. stride: between two outputs.
    """

    def __init__(self, inputs: int, outputs: int, reach: int, stride: int = 1) -> None:
        super().__init__()
        self.taps, self.stride = powers(reach), stride
        self.proj = nn.Linear(len(self.taps) * inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat(_shifted(x, self.taps, self.stride), dim=-1))


class DepthwisePowersConv1d(nn.Module):
    """Each channel by itself, `(b, l, c)` to the same shape. It starts as the identity.

    Padding and the neighbours in a packed row are as if they were not there. `torch.compile` makes one pass of it;
    eagerly it is one a tap.

    Args:
        channels: c. reach: of the farthest tap, see `powers`.
    """

    def __init__(self, channels: int, reach: int) -> None:
        super().__init__()
        self.taps = powers(reach)
        self.weight = nn.Parameter(torch.empty(len(self.taps), channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.weight[len(self.taps) // 2])

    def forward(self, x: Tensor, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """mask: `(b, l)` bool, False at padding. seq_idx: `(b, l)`, packed sequences."""
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        weight = self.weight.to(x.dtype)
        parts = _shifted(x, self.taps)
        if seq_idx is not None:
            # counted from 1: what lies beyond the ends is no sequence's
            ids = _shifted(seq_idx[..., None] + 1, self.taps)
            parts = [torch.where(id == seq_idx[..., None] + 1, part, 0.0) for id, part in zip(ids, parts, strict=True)]
        out = parts[0] * weight[0]
        for part, w in zip(parts[1:], weight[1:], strict=True):
            out = out + part * w
        return out
