"""Embeddings that look at a neighbourhood first: convolutions over the sequence of pixels, or over the image."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from bimamba.nn.embedding import Positions, expect_kind
from bimamba.nn.norm import RMSNorm
from bimamba.spec import DataSpec


class PixelConvEmbedding(nn.Module):
    """An image as the sequence of its pixels, row by row, behind a few one-dimensional convolutions: `(b, c, height,
    width)` to `(b, tokens, d_model)`, `height * width` divided by each stride in turn, rounded up.

    Nothing here knows where a row ends. Convolutions as long as (or longer than) what there is to find are how CKConv
    (Romero et al. 2022, arXiv:2102.02611) reads sequential images; one wider than two rows can learn from the rows
    above and below. Between two of them come a norm over the channels and GELU.

    Args:
        spec, d_model: the data, and the width of a token.
        channels: of the layers before the last one, which has `d_model`.
        kernel_sizes: what each layer sees of the one before; odd.
        strides: of each layer.
        positions: see `Positions`.

    Raises:
        ValueError: no images, lists that do not fit each other, an even kernel size, or a number below 1.
    """

    def __init__(
        self,
        spec: DataSpec,
        d_model: int,
        channels: tuple[int, ...] = (64, 96),
        kernel_sizes: tuple[int, ...] = (67, 67, 35),
        strides: tuple[int, ...] = (1, 2, 2),
        positions: str = "learned",
    ) -> None:
        super().__init__()
        expect_kind(spec, "image", "pixels_conv")
        if not len(strides) == len(kernel_sizes) == len(channels) + 1 or min(*strides, *channels, 1) < 1:
            raise ValueError(
                "channels, kernel_sizes, strides: expected numbers of at least 1, a kernel size and a stride for each "
                f"of the channels and for the last layer, got {list(channels)}, {list(kernel_sizes)}, {list(strides)}"
            )
        if any(k < 1 or k % 2 == 0 for k in kernel_sizes):
            raise ValueError(f"kernel_sizes: expected odd numbers, got {list(kernel_sizes)}")
        colours, height, width = spec.image_shape
        sizes = [colours, *channels, d_model]
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, k, stride, padding=k // 2)
            for a, b, k, stride in zip(sizes[:-1], sizes[1:], kernel_sizes, strides, strict=True)
        )
        self.norms = nn.ModuleList(RMSNorm(size, cast=True) for size in channels)
        tokens = height * width
        for stride in strides:
            tokens = -(-tokens // stride)
        self.positions = Positions(positions, d_model, tokens)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        x = inputs.flatten(2).transpose(1, 2).contiguous()  # b l c
        for i, conv in enumerate(self.convs):
            if i:
                x = F.gelu(self.norms[i - 1](x))
            x = _conv1d(x, cast(nn.Conv1d, conv))
        return self.positions(x.contiguous())


def _conv1d(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """`(b, l, c)` to `(b, ceil(l / stride), d)`, channels last all the way: as a convolution of images of height 1,
    which cuDNN computes without transposing.

    One with a stride is computed without: groups of `stride` neighbours, side by side in memory, are the channels of a
    sequence that much shorter. cuDNN has fast kernels for that (H100, 67 wide, 64 to 256 channels, stride 4, forward
    and backward: 2.0 ms instead of 12.5).
    """
    weight, stride, padding = conv.weight, conv.stride[0], int(conv.padding[0])
    if stride > 1:
        l, width = x.shape[1], weight.shape[2]
        groups = -(-width // stride)
        rows = -(-l // stride) + groups - 1
        x = F.pad(x, (0, 0, padding, rows * stride - l - padding)).unflatten(1, (rows, stride)).flatten(2)
        weight = F.pad(weight, (0, groups * stride - width)).unflatten(2, (groups, stride))
        weight, padding = weight.permute(0, 3, 1, 2).flatten(1, 2), 0
    y = F.conv2d(x.transpose(1, 2)[:, :, None], weight[:, :, None], conv.bias, padding=(0, padding))
    return y.squeeze(2).transpose(1, 2)


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
