"""Embeddings that look at a neighbourhood first: convolutions over the sequence of pixels, or over the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba.nn.embedding import Positions, expect_kind
from bimamba.nn.norm import RMSNorm
from bimamba.spec import DataSpec


class PixelConvEmbedding(nn.Module):
    """An image as the sequence of its pixels, row by row, behind a few one-dimensional convolutions: `(b, c, height,
    width)` to `(b, tokens, d_model)`, `height * width` divided by each stride in turn, rounded up.

    Nothing here knows where a row ends. A layer looks at places 0, 1, 2, 4, ... up to `reach` before and behind
    (`PowersConv1d`), so that a few layers see far, as in WaveNet and MultiresNet (Shi et al. 2023, arXiv:2305.01638);
    where rows are as long as a power of two, one of the places is that above. Between two layers come a norm over the
    channels and GELU.

    Args:
        spec, d_model: the data, and the width of a token.
        channels: of the layers before the last one, which has `d_model`.
        reach: how far each layer sees, in steps of its own input.
        strides: of each layer.
        positions: see `Positions`.

    Raises:
        ValueError: no images, lists that do not fit each other, or a number below 1 (a reach below 0).
    """

    def __init__(
        self,
        spec: DataSpec,
        d_model: int,
        channels: tuple[int, ...] = (64, 128),
        reach: tuple[int, ...] = (32, 16, 8),
        strides: tuple[int, ...] = (2, 2, 2),
        positions: str = "learned",
    ) -> None:
        super().__init__()
        expect_kind(spec, "image", "pixels_conv")
        if not len(strides) == len(reach) == len(channels) + 1 or min(*strides, *channels, 1) < 1 or min(reach) < 0:
            raise ValueError(
                "channels, reach, strides: expected numbers of at least 1 (reach: 0), a reach and a stride for each of "
                f"the channels and for the last layer, got {list(channels)}, {list(reach)}, {list(strides)}"
            )
        colours, height, width = spec.image_shape
        sizes = [colours, *channels, d_model]
        self.convs = nn.ModuleList(
            PowersConv1d(*options) for options in zip(sizes[:-1], sizes[1:], reach, strides, strict=True)
        )
        self.norms = nn.ModuleList(RMSNorm(size, cast=True) for size in channels)
        tokens = height * width
        for stride in strides:
            tokens = -(-tokens // stride)
        self.positions = Positions(positions, d_model, tokens)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        x = inputs.flatten(2).transpose(1, 2)  # b l c
        for i, conv in enumerate(self.convs):
            if i:
                x = F.gelu(self.norms[i - 1](x))
            x = conv(x)
        return self.positions(x)


class PowersConv1d(nn.Module):
    """A one-dimensional convolution with taps at 0 and at powers of two to both sides, `(b, l, c)` to
    `(b, ceil(l / stride), d)`; outside of the sequence are zeros.

    As a product of the weights with the shifted copies side by side: eleven or thirteen taps instead of 33 or 65, and
    no convolution whose dilation or stride cuDNN has no fast gradient for.

    Args:
        inputs, outputs: channels c and d. reach: the farthest tap, rounded down to a power of two; 0: that at 0 alone.
        stride: between two outputs.
    """

    def __init__(self, inputs: int, outputs: int, reach: int, stride: int = 1) -> None:
        super().__init__()
        powers = [2**k for k in range(reach.bit_length())]
        self.taps = [*(-p for p in reversed(powers)), 0, *powers]
        self.stride = stride
        self.proj = nn.Linear(len(self.taps) * inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        l, reach = x.shape[1], self.taps[-1]
        padded = F.pad(x, (0, 0, reach, reach))
        copies = [padded[:, reach + tap : reach + tap + l : self.stride] for tap in self.taps]
        return self.proj(torch.cat(copies, dim=-1))


class ConvStem(nn.Module):
    """An image behind a few 3 x 3 convolutions (Xiao et al. 2021, arXiv:2106.14881; Hassani et al. 2021,
    arXiv:2104.05704): `(b, c, height, width)` to `(b, height / 2^k * width / 2^k, d_model)`, row by row, k the number
    of strides of 2.

    Each layer is a convolution, and between two of them a norm over the channels and GELU.

    Args:
        spec, d_model: the data, and the width of a token.
        channels: of the layers before the last one, which has `d_model`.
        strides: of each layer, one more than there are `channels`; 1 or 2.
        positions: see `Positions`.

    Raises:
        ValueError: no images, lists that do not fit each other, or strides that do not divide height and width.
    """

    def __init__(
        self,
        spec: DataSpec,
        d_model: int,
        channels: tuple[int, ...] = (64, 128),
        strides: tuple[int, ...] = (1, 2, 1),
        positions: str = "learned",
    ) -> None:
        super().__init__()
        expect_kind(spec, "image", "conv_stem")
        if len(strides) != len(channels) + 1 or not set(strides) <= {1, 2} or min(channels, default=1) < 1:
            raise ValueError(
                "channels, strides: expected a stride of 1 or 2 for each of the channels and one for the last layer, "
                f"got {list(channels)} and {list(strides)}"
            )
        colours, height, width = spec.image_shape
        total = 1
        for stride in strides:
            total *= stride
        if height % total or width % total:
            raise ValueError(f"strides: expected a product that divides {height} and {width}, got {total}")
        self.grid = (height // total, width // total)
        sizes = [colours, *channels, d_model]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, padding=1) for a, b, stride in zip(sizes[:-1], sizes[1:], strides, strict=True)
        )
        self.norms = nn.ModuleList(RMSNorm(size, cast=True) for size in channels)
        self.positions = Positions(positions, d_model, self.grid[0] * self.grid[1])

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        x = inputs.permute(0, 2, 3, 1).contiguous()  # b h w c: channels last for convolution and norm
        for i, conv in enumerate(self.convs):
            if i:
                x = F.gelu(self.norms[i - 1](x))
            x = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.positions(x.flatten(1, 2).contiguous())
