"""From a batch's inputs to tokens: pixels, patches or nucleotides, with positions.

An embedding is made from a `DataSpec` and a width, and maps `(inputs, mask)` to `tokens (b, l, d_model)`; those of
sequences also take a `Packing`, whose positions begin anew with each sequence.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba.nn.decay import undecayed
from bimamba.packing import Packing, positions
from bimamba.spec import DataSpec

POSITIONS = ("learned", "sinusoidal", "none")


class Positions(nn.Module):
    """Adds a position to each token: learned, sinusoidal (Vaswani et al. 2017, arXiv:1706.03762), or nothing.

    Raises:
        ValueError: an unknown kind, or at use a sequence longer than `max_length` learned positions.
    """

    def __init__(self, kind: str, d_model: int, max_length: int) -> None:
        super().__init__()
        if kind not in POSITIONS:
            raise ValueError(f"positions: expected one of {POSITIONS}, got {kind!r}")
        self.kind, self.d_model, self.max_length = kind, d_model, max_length
        if kind == "learned":
            self.table = nn.Parameter(torch.empty(max_length, d_model))
            undecayed(self, "table")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.kind == "learned":
            nn.init.normal_(self.table, std=0.02)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        if self.kind == "none":
            return x
        l = x.shape[1]
        position = torch.arange(l, device=x.device) if packing is None else positions(packing)
        if self.kind == "sinusoidal":
            return x + sinusoids(position, self.d_model).to(x.dtype)
        if packing is not None:  # whoever packs has cut the sequences to max_length; looking would wait for the device
            return x + F.embedding(position, self.table)
        if l > self.max_length:
            raise ValueError(f"positions: learned for {self.max_length} tokens, got a sequence of {l}")
        return x + self.table[:l]


def sinusoids(position: Tensor, d: int) -> Tensor:
    """`(..., d)` of integer positions `(...)`: sines in the first half of the channels, cosines in the second,
    wavelengths from 2 pi to 2 pi 10^4."""
    half = d // 2
    rate = torch.exp(torch.arange(half, device=position.device) * (-math.log(1e4) / max(half - 1, 1)))
    angle = position[..., None] * rate
    return torch.cat([angle.sin(), angle.cos(), angle.new_zeros(*position.shape, d - 2 * half)], dim=-1)


def expect_kind(spec: DataSpec, kind: str, embedding: str) -> None:
    """Raises a ValueError where the data are not what an embedding takes."""
    if spec.kind != kind:
        raise ValueError(
            f"{embedding} embeds data of kind {kind!r}, got {spec.kind!r}; choose another model/embedding for this data"
        )


class PixelEmbedding(nn.Module):
    """An image as the sequence of its pixels, row by row: `(b, c, height, width)` to `(b, height * width, d_model)`."""

    def __init__(self, spec: DataSpec, d_model: int, positions: str = "learned") -> None:
        super().__init__()
        expect_kind(spec, "image", "pixels")
        channels, height, width = spec.image_shape
        self.grid = (height, width)
        self.proj = nn.Linear(channels, d_model)
        self.positions = Positions(positions, d_model, height * width)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.positions(self.proj(inputs.flatten(2).transpose(1, 2)))


class PatchEmbedding(nn.Module):
    """An image as its patches, row by row (Dosovitskiy et al. 2021, arXiv:2010.11929): `(b, c, height, width)` to
    `(b, height / patch_size * width / patch_size, d_model)`.

    Raises:
        ValueError: the patch size does not divide height and width.
    """

    def __init__(self, spec: DataSpec, d_model: int, patch_size: int = 4, positions: str = "learned") -> None:
        super().__init__()
        expect_kind(spec, "image", "patches")
        channels, height, width = spec.image_shape
        if height % patch_size or width % patch_size:
            raise ValueError(f"patch_size: expected a divisor of {height} and {width}, got {patch_size}")
        self.grid = (height // patch_size, width // patch_size)
        self.proj = nn.Conv2d(channels, d_model, patch_size, stride=patch_size)
        self.positions = Positions(positions, d_model, height * width // patch_size**2)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        # contiguous: all that is added to the stream behind it keeps its strides
        return self.positions(self.proj(inputs).flatten(2).transpose(1, 2).contiguous())


class NucleotideEmbedding(nn.Module):
    """One token a character: ids `(b, l)` to `(b, l, d_model)`; id 0 is padding and embeds as zero."""

    def __init__(self, spec: DataSpec, d_model: int, positions: str = "none") -> None:
        super().__init__()
        expect_kind(spec, "sequence", "nucleotides")
        self.embed = nn.Embedding(spec.num_tokens, d_model, padding_idx=0)
        self.positions = Positions(positions, d_model, spec.longest)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        return self.positions(self.embed(inputs), packing)
