"""Augmentation and normalisation of whole batches, on the device they are on.

All random numbers come from torch's global generators, so a resumed run that restores those goes on as it would have.
Crop and flips are one gather each on uint8: kornia's loop over the images and wait for the device at each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba.data.policies import random_erase, trivial_augment
from bimamba.packing import Packing
from bimamba.strands import complement_tokens, other_strand


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Pads with zeros and cuts the old size out at a random place of each image. `(b, c, h, w)`, any dtype."""
    b, _, h, w = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, b, 1), device=images.device)
    rows = (top + torch.arange(h, device=images.device))[:, None, :, None]  # b 1 h 1
    columns = (left + torch.arange(w, device=images.device))[:, None, None, :]  # b 1 1 w
    batch = torch.arange(b, device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[batch, channel, rows, columns]


def random_flip(images: Tensor, probability: float, dim: int) -> Tensor:
    """Mirrors each image with this probability. `(b, c, h, w)`, any dtype."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(chosen, images.flip(dim), images)


class ImageAugmentation(nn.Module):
    """Training-time augmentation of uint8 images; see configs/data for what each option means.

    Args:
        crop_padding: pixels of zero padding around the image before a random crop of the old size; 0 = off.
        horizontal_flip, vertical_flip: probability.
        color_jitter: strength of brightness, contrast, saturation and hue; None = off.
        rand_augment: `[operations, magnitude]` (magnitude between 0 and 30) of RandAugment (Cubuk 2020); None = off.
        random_erasing: probability of erasing a rectangle (Zhong 2020), by the mean colour.
        trivial_augment: probability of one random operation (Müller 2021). On one CPU core 17,000 images of CIFAR a
            second, rand_augment 8,000 to 11,000; nothing in it loops over images or waits for the device.
        resized_crop: part of the area, from and to, of a random resized crop; None = off.

    Raises:
        ValueError: an option is out of range.
    """

    GROUPS = 8  # kornia draws RandAugment's operations once a call: each eighth of a batch gets its own

    def __init__(
        self,
        crop_padding: int = 0,
        horizontal_flip: float = 0.0,
        vertical_flip: float = 0.0,
        color_jitter: Sequence[float] | None = None,
        rand_augment: Sequence[float] | None = None,
        random_erasing: float = 0.0,
        resized_crop: Sequence[float] | None = None,
        trivial_augment: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("horizontal_flip", horizontal_flip),
            ("vertical_flip", vertical_flip),
            ("random_erasing", random_erasing),
            ("trivial_augment", trivial_augment),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"data.augment.{name}: expected a probability in [0, 1], got {value}")
        if crop_padding < 0:
            raise ValueError(f"data.augment.crop_padding: expected a number of pixels, got {crop_padding}")
        if color_jitter is not None and len(color_jitter) != 4:
            raise ValueError(
                f"data.augment.color_jitter: expected [brightness, contrast, saturation, hue], got {list(color_jitter)}"
            )
        if rand_augment is not None and (len(rand_augment) != 2 or not 0 < rand_augment[1] < 30 or rand_augment[0] < 1):
            raise ValueError(
                "data.augment.rand_augment: expected [operations, magnitude], magnitude between 0 and 30, "
                f"got {list(rand_augment)}"
            )
        if resized_crop is not None and not (len(resized_crop) == 2 and 0 < resized_crop[0] <= resized_crop[1] <= 1):
            raise ValueError(
                f"data.augment.resized_crop: expected [from, to], parts of the area in (0, 1], got {list(resized_crop)}"
            )
        self.crop_padding, self.horizontal_flip, self.vertical_flip = crop_padding, horizontal_flip, vertical_flip
        self.resized_crop = (resized_crop[0], resized_crop[1]) if resized_crop is not None else None
        self.color_jitter, self.rand_augment, self.random_erasing = color_jitter, rand_augment, random_erasing
        self.trivial_augment = trivial_augment
        self._built: dict[str, nn.Module] = {}

    def forward(self, images: Tensor, mean: Tensor, crop: bool = True) -> Tensor:
        """uint8 `(b, c, h, w)` to float32 of the same shape, in [0, 1].

        Args:
            images: the batch.
            mean: `(c,)`, what erased pixels are set to.
            crop: False where the images come from a random resized crop already.
        """
        if self.crop_padding:
            images = random_crop(images, self.crop_padding)
        if self.horizontal_flip:
            images = random_flip(images, self.horizontal_flip, -1)
        if self.vertical_flip:
            images = random_flip(images, self.vertical_flip, -2)
        images = images.float().div_(255)
        if crop and self.resized_crop is not None:
            images = self._kornia("resized_crop", (images.shape[-2], images.shape[-1]))(images)
        if self.color_jitter is not None:
            images = self._kornia("color_jitter")(images)
        if self.rand_augment is not None:
            images = torch.cat([self._kornia("rand_augment")(part) for part in images.chunk(self.GROUPS)])
        if self.trivial_augment:
            images = trivial_augment(images, self.trivial_augment, mean)
        if self.random_erasing:  # by the mean: after normalisation the rectangle says nothing
            images = random_erase(images, self.random_erasing, mean)
        return images

    def _kornia(self, name: str, size: tuple[int, int] | None = None) -> nn.Module:
        if name not in self._built:
            import kornia.augmentation as K

            # What is None here is not asked for.
            crop: Any = self.resized_crop
            jitter: Any = self.color_jitter
            rand: Any = self.rand_augment
            module: nn.Module
            if name == "resized_crop":
                assert size is not None
                module = K.RandomResizedCrop(size, scale=crop, cropping_mode="resample")
            elif name == "color_jitter":
                module = K.ColorJitter(*jitter)
            else:
                module = K.auto.RandAugment(int(rand[0]), int(rand[1]))
            self._built[name] = module
        return self._built[name]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """float32 `(b, c, h, w)` in [0, 1] (or uint8, scaled first), to mean 0 and deviation 1 per channel."""
    if images.dtype == torch.uint8:
        images = images.float().div_(255)
    return (images - mean[:, None, None]) / std[:, None, None]


class ReverseComplement(nn.Module):
    """Reads each DNA sequence on the other strand, with a probability. Padding stays where it is, at the end.

    Args:
        alphabet: of the token ids.
        probability: of a sequence being turned.

    Raises:
        ValueError: the alphabet is not DNA, or the probability out of range.
    """

    def __init__(self, alphabet: str, probability: float) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise ValueError(f"data.augment.reverse_complement: expected a probability in [0, 1], got {probability}")
        self.probability = probability
        self.complement: Tensor
        self.register_buffer("complement", complement_tokens(alphabet).long(), persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor, packing: Packing | None = None) -> Tensor:
        """Token ids int64 `(b, l)`, mask bool `(b, l)`; each sequence of a packed row is drawn by itself."""
        slots = 1 if packing is None else packing.bounds.shape[1] - 1
        chosen = torch.rand(len(tokens), slots, device=tokens.device) < self.probability
        if packing is not None:
            chosen = chosen.gather(1, packing.seq_idx.long())
        if self.complement.device != tokens.device:
            self.to(tokens.device)  # once: a copy at each batch would wait for the device
        return torch.where(chosen, other_strand(tokens, self.complement, mask, packing), tokens)


def _known(option: str, alphabet: str) -> int:
    """How many characters can be drawn: all but the last, which stands for the unknown."""
    if len(alphabet) < 2:
        raise ValueError(f"data.augment.{option}: expected an alphabet of known characters, got {alphabet!r}")
    return len(alphabet) - 1


class RandomSubstitution(nn.Module):
    """Puts a random character of the alphabet (not the unknown one) in place of each real one, with a probability.

    Against learning a small data set by heart (Lee et al. 2023, "EvoAug"). Padding stays as it is.

    Args:
        alphabet: of the token ids; the last character stands for the unknown.
        probability: of a character being drawn anew; it may come out as it was.

    Raises:
        ValueError: the probability is out of range, or there is nothing to draw.
    """

    def __init__(self, alphabet: str, probability: float) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise ValueError(f"data.augment.substitution: expected a probability in [0, 1], got {probability}")
        self.known, self.probability = _known("substitution", alphabet), probability

    def forward(self, tokens: Tensor, mask: Tensor, packing: Packing | None = None) -> Tensor:
        """Token ids int64 `(b, l)`, mask bool `(b, l)`."""
        chosen = (torch.rand(tokens.shape, device=tokens.device) < self.probability) & mask
        return torch.where(chosen, torch.randint_like(tokens, 1, self.known + 1), tokens)


class RandomShift(nn.Module):
    """Moves each sequence along its window, by up to some characters to either side (as in Basenji, Kelley et al.
    2018). What moves out is lost, what moves in is drawn from the alphabet; lengths and padding stay.

    Args:
        alphabet: of the token ids; the last character stands for the unknown and is not drawn.
        most: characters.

    Raises:
        ValueError: `most` is negative or no whole number, or there is nothing to draw.
    """

    def __init__(self, alphabet: str, most: int) -> None:
        super().__init__()
        if not isinstance(most, int) or most < 0:
            raise ValueError(f"data.augment.shift: expected a whole number of characters, 0 or more, got {most!r}")
        self.known, self.most = _known("shift", alphabet), most

    def forward(self, tokens: Tensor, mask: Tensor, packing: Packing | None = None) -> Tensor:
        """Token ids int64 `(b, l)`, mask bool `(b, l)`; each sequence of a packed row is drawn by itself."""
        b, l = tokens.shape
        slots = 1 if packing is None else packing.bounds.shape[1] - 1
        shift = torch.randint(-self.most, self.most + 1, (b, slots), device=tokens.device)
        if packing is not None:
            shift = shift.gather(1, packing.seq_idx.long())
        source = torch.arange(l, device=tokens.device) - shift
        inside = (source >= 0) & (source < l)
        source = source.clamp(0, l - 1).expand(b, l)
        inside = inside & mask.gather(1, source)
        if packing is not None:
            inside = inside & (packing.seq_idx.gather(1, source) == packing.seq_idx)
        moved = torch.where(inside, tokens.gather(1, source), torch.randint_like(tokens, 1, self.known + 1))
        return torch.where(mask, moved, tokens)
