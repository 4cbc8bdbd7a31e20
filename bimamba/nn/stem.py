"""Embeddings that look at a neighbourhood first: convolutions over the sequence of pixels, or over the image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bimamba.nn.embedding import Positions, expect_kind
from bimamba.nn.norm import RMSNorm
from bimamba.spec import DataSpec


class PixelConvEmbedding(nn.Module):
    """An image as the sequence of its pixels, row by row, behind two one-dimensional convolutions:
    `(b, c, height, width)` to `(b, ceil(height * width / stride), d_model)`.

    Nothing here knows where a row ends. Convolutions as long as (or longer than) what there is to find are how CKConv
    (Romero et al. 2022, arXiv:2102.02611) reads sequential images; one wider than two rows can learn from the rows
    above and below.

    Args:
        spec, d_model: the data, and the width of a token.
        hidden: channels between the two convolutions.
        kernel_size: pixels that each of them sees; odd.
        stride: of the second one: so many pixels become one token.
        positions: see `Positions`.

    Raises:
        ValueError: no images, an even `kernel_size`, or a number below 1.
    """

    def __init__(
        self,
        spec: DataSpec,
        d_model: int,
        hidden: int = 64,
        kernel_size: int = 67,
        stride: int = 4,
        positions: str = "learned",
    ) -> None:
        super().__init__()
        expect_kind(spec, "image", "pixels_conv")
        if hidden < 1 or stride < 1:
            raise ValueError(f"hidden, stride: expected at least 1, got {hidden} and {stride}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        channels, height, width = spec.image_shape
        self.stride = stride
        self.conv1 = nn.Conv1d(channels, hidden, kernel_size, padding=kernel_size // 2)
        self.norm = RMSNorm(hidden, cast=True)
        self.conv2 = nn.Conv1d(hidden, d_model, kernel_size, padding=kernel_size // 2, stride=stride)
        self.positions = Positions(positions, d_model, -(-height * width // stride))

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        pixels = inputs.flatten(2).transpose(1, 2).contiguous()  # b l c
        x = F.gelu(self.norm(_conv1d(pixels, self.conv1)))
        return self.positions(_conv1d(x, self.conv2).contiguous())


def _conv1d(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """`(b, l, c)` to `(b, l / stride, d)`, channels last all the way: as a convolution of images of height 1, which
    cuDNN computes without transposing."""
    x = x.transpose(1, 2)[:, :, None]  # b c 1 l
    y = F.conv2d(x, conv.weight[:, :, None], conv.bias, (1, conv.stride[0]), (0, int(conv.padding[0])))
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
