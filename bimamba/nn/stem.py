"""Embeddings that look at a neighbourhood first: convolutions over the sequence of pixels, or over the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from bimamba.nn.embedding import Positions, expect_kind
from bimamba.nn.norm import RMSNorm
from bimamba.nn.powers import PowersConv1d
from bimamba.spec import DataSpec


class Convolutions(nn.Module):
    """Layers one after another, channels last; in front of each but the first a norm over the channels and GELU.

    Behind a layer stand `residual` more of its width, each of which adds to its input (He et al. 2016,
    arXiv:1603.05027).

    Args:
        sizes: channels of the input and of each layer's output.
        residual: how many of these stand behind each layer.
        make: `make(layer, inputs, outputs, first)`, a convolution that takes channels last; `first` is False for the
            residual ones, which keep the length.
    """

    def __init__(
        self, sizes: Sequence[int], residual: Sequence[int], make: Callable[[int, int, int, bool], nn.Module]
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            make(i, inputs, outputs, True) for i, (inputs, outputs) in enumerate(pairwise(sizes))
        )
        self.norms = nn.ModuleList(RMSNorm(size, cast=True) for size in sizes[1:-1])
        self.residual = nn.ModuleList(
            nn.Sequential(*(Residual(RMSNorm(d, cast=True), nn.GELU(), make(i, d, d, False)) for _ in range(count)))
            for i, (count, d) in enumerate(zip(residual, sizes[1:], strict=True))
        )

    def convolve(self, x: Tensor) -> Tensor:
        """x: `(b, ..., c)`."""
        for i, conv in enumerate(self.convs):
            if i:
                x = F.gelu(self.norms[i - 1](x))
            x = self.residual[i](conv(x))
        return x


class Residual(nn.Sequential):
    """Modules one after another, and their input added."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _of_each_layer(residual: Sequence[int] | None, strides: Sequence[int]) -> list[int]:
    residual = [0] * len(strides) if residual is None else list(residual)
    if len(residual) != len(strides) or min(residual) < 0:
        raise ValueError(
            f"residual: expected a number of layers, 0 or more, for each of the {len(strides)} strides, got {residual}"
        )
    return residual


class PixelConvEmbedding(Convolutions):
    """An image as the sequence of its pixels, row by row, behind a few one-dimensional convolutions: `(b, c, height,
    width)` to `(b, tokens, d_model)`, `height * width` divided by each stride in turn, rounded up.

    Nothing here knows where a row ends. A layer looks at places 0, 1, 2, 4, ... up to `reach` before and behind
    (`PowersConv1d`), so that a few layers see far.

    Args:
        spec, d_model: the data, and the width of a token.
        channels: of the layers before the last one, which has `d_model`.
        reach: how far each layer sees, in steps of its own input.
        strides: of each layer.
        residual: see `Convolutions`; they see as many pixels far as the layer before them. None: none.
        positions: see `Positions`.

    Raises:
        ValueError: no images, lists that do not fit each other, or a number below 1 (a reach below 0).
    """

    def __init__(
        self,
        spec: DataSpec,
        d_model: int,
        channels: Sequence[int] = (64, 128),
        reach: Sequence[int] = (32, 16, 8),
        strides: Sequence[int] = (2, 2, 2),
        residual: Sequence[int] | None = None,
        positions: str = "learned",
    ) -> None:
        expect_kind(spec, "image", "pixels_conv")
        if not len(strides) == len(reach) == len(channels) + 1 or min(*strides, *channels, 1) < 1 or min(reach) < 0:
            raise ValueError(
                "channels, reach, strides: expected numbers of at least 1 (reach: 0), a reach and a stride for each of "
                f"the channels and for the last layer, got {list(channels)}, {list(reach)}, {list(strides)}"
            )
        residual = _of_each_layer(residual, strides)
        colours, height, width = spec.image_shape

        def make(i: int, inputs: int, outputs: int, first: bool) -> nn.Module:
            stride = strides[i] if first else 1
            return PowersConv1d(inputs, outputs, reach[i] if first else reach[i] // strides[i], stride)

        super().__init__([colours, *channels, d_model], residual, make)
        tokens = height * width
        for stride in strides:
            tokens = -(-tokens // stride)
        self.positions = Positions(positions, d_model, tokens)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.positions(self.convolve(inputs.flatten(2).transpose(1, 2)))


class ConvStem(Convolutions):
    """An image behind a few 3 x 3 convolutions (Xiao et al. 2021, arXiv:2106.14881; Hassani et al. 2021,
    arXiv:2104.05704): `(b, c, height, width)` to `(b, height / 2^k * width / 2^k, d_model)`, row by row, k the number
    of strides of 2.

    Args:
        spec, d_model: the data, and the width of a token.
        channels: of the layers before the last one, which has `d_model`.
        strides: of each layer, one more than there are `channels`; 1 or 2.
        residual: see `Convolutions`. None: none.
        positions: see `Positions`.

    Raises:
        ValueError: no images, lists that do not fit each other, or strides that do not divide height and width.
    """

    def __init__(
        self,
        spec: DataSpec,
        d_model: int,
        channels: Sequence[int] = (64, 128),
        strides: Sequence[int] = (1, 2, 1),
        residual: Sequence[int] | None = None,
        positions: str = "learned",
    ) -> None:
        expect_kind(spec, "image", "conv_stem")
        if len(strides) != len(channels) + 1 or not set(strides) <= {1, 2} or min(channels, default=1) < 1:
            raise ValueError(
                "channels, strides: expected a stride of 1 or 2 for each of the channels and one for the last layer, "
                f"got {list(channels)} and {list(strides)}"
            )
        residual = _of_each_layer(residual, strides)
        colours, height, width = spec.image_shape
        total = 1
        for stride in strides:
            total *= stride
        if height % total or width % total:
            raise ValueError(f"strides: expected a product that divides {height} and {width}, got {total}")

        def make(i: int, inputs: int, outputs: int, first: bool) -> nn.Module:
            return ChannelsLastConv2d(inputs, outputs, 3, strides[i] if first else 1, padding=1)

        super().__init__([colours, *channels, d_model], residual, make)
        self.grid = (height // total, width // total)
        self.positions = Positions(positions, d_model, self.grid[0] * self.grid[1])

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.convolve(inputs.permute(0, 2, 3, 1).contiguous())
        return self.positions(x.flatten(1, 2).contiguous())


class ChannelsLastConv2d(nn.Conv2d):
    """`nn.Conv2d` that takes and returns `(b, h, w, c)`: in memory what PyTorch calls channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
