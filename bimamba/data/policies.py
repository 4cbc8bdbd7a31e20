"""TrivialAugment and random erasing of whole batches.

The images of a batch are sorted by the operation that each has drawn, and every operation then runs once, on those that
drew it: no loop over images, and no operation that is computed for nothing. Whatever moves an image is sampled in one
pass, and whatever blends it with another in one more: what a batch costs is the host's time for a hundred launches.
Operations are drawn on the host, so nobody waits for the device to say how many images got which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

# The strongest, as of TrivialAugment's wide space; shifts are a part of the side.
SHEAR, SHIFT, DEGREES, BLEND, BITS = 0.99, 0.5, 135.0, 0.99, 2


def trivial_augment(images: Tensor, probability: float, fill: Tensor, operation: Tensor | None = None) -> Tensor:
    """One random operation of random strength on each image: TrivialAugment (Müller and Hutter 2021,
    arXiv:2103.10158), wide. Random numbers come from torch's global generators.

    Args:
        images: float `(b, 3, h, w)` in [0, 1].
        probability: of an image being changed at all.
        fill: `(3)`, the colour that a shear, a shift or a rotation leaves behind.
        operation: int64 `(b)` on the host, positions in `OPERATIONS`; None: drawn.

    Returns:
        float `(b, 3, h, w)` in [0, 1].
    """
    if not len(images):
        return images
    if operation is None:
        operation = torch.randint(len(OPERATIONS), (len(images),))
        operation[torch.rand(len(images)) >= probability] = 0
    strength = torch.rand(len(images), 1, 1, 1, device=images.device)
    strength = torch.where(torch.rand_like(strength) < 0.5, strength, -strength)
    order = operation.argsort().to(images.device, non_blocking=True)
    counts = operation.bincount(minlength=len(OPERATIONS)).tolist()
    result = torch.empty_like(images)
    result[order] = operate(images[order], strength[order], counts, fill)
    return result


def operate(images: Tensor, amount: Tensor, counts: Sequence[int], fill: Tensor) -> Tensor:
    """The first `counts[0]` images changed by the first of the `OPERATIONS`, the next ones by the second, and so on.

    Args:
        images: float `(b, 3, h, w)` in [0, 1].
        amount: `(b, 1, 1, 1)` in [-1, 1].
        counts: of each operation; their sum is b.
        fill: `(3)`, the colour that a move leaves behind.
    """
    done, at = [], 0
    for operations, change in ((UNMOVED, _one_by_one), (MOVES, partial(_moved, fill=fill)), (BLENDS, _blended)):
        numbers, at = counts[at : at + len(operations)], at + len(operations)
        n = sum(numbers)
        if n:
            done.append(change(images[:n], amount[:n], numbers))
        images, amount = images[n:], amount[n:]
    return torch.cat(done)


def _one_by_one(images: Tensor, amount: Tensor, counts: Sequence[int]) -> Tensor:
    parts = zip(UNMOVED.values(), images.split(counts), amount.split(counts), strict=True)
    return torch.cat([make(part, amounts) for make, part, amounts in parts if len(part)])


def identity(images: Tensor, amount: Tensor) -> Tensor:
    """As it is."""
    return images


def posterize(images: Tensor, amount: Tensor) -> Tensor:
    """Only the 2 to 8 highest bits of each value."""
    size = 2.0 ** (amount.abs() * (8 - BITS)).round()  # of a step
    return ((images * 255).round() / size).floor() * size / 255


def solarize(images: Tensor, amount: Tensor) -> Tensor:
    """Values above a threshold are turned around."""
    return torch.where(images >= 1 - amount.abs(), 1 - images, images)


def autocontrast(images: Tensor, amount: Tensor) -> Tensor:
    """Each channel's darkest value becomes 0 and its lightest 1; a channel of one value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def equalize(images: Tensor, amount: Tensor) -> Tensor:
    """Each channel's 256 values spread so that all are about equally frequent, as Pillow does it."""
    values = (images * 255).round().long().flatten(2)  # n 3 hw
    # Integers: CUDA's cumulative sums of floats are not deterministic
    counts = values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(2, keepdim=True))
    step = ((values.shape[2] - last) // 255).to(images.dtype)
    before = (counts.cumsum(2) - counts).to(images.dtype)
    table = ((before + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, 255) / 255
    return torch.where((step > 0)[..., None], table.gather(2, values).view_as(images), images)


UNMOVED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    made.__name__: made for made in (identity, posterize, solarize, autocontrast, equalize)
}

# Entries of the 2 x 3 matrix from coordinates in the new image, -1 to 1, to the old one's; others are the identity's
Entries = dict[tuple[int, int], Tensor]


def shear_x(amount: Tensor) -> Entries:
    """Rows slide along."""
    return {(0, 1): SHEAR * amount}


def shear_y(amount: Tensor) -> Entries:
    """Columns slide along."""
    return {(1, 0): SHEAR * amount}


def translate_x(amount: Tensor) -> Entries:
    """Moved to a side."""
    return {(0, 2): 2 * SHIFT * amount}


def translate_y(amount: Tensor) -> Entries:
    """Moved up or down."""
    return {(1, 2): 2 * SHIFT * amount}


def rotate(amount: Tensor) -> Entries:
    """Turned around the centre."""
    angle = math.radians(DEGREES) * amount
    cos, sin = angle.cos(), angle.sin()
    return {(0, 0): cos, (0, 1): -sin, (1, 0): sin, (1, 1): cos}


MOVES = {made.__name__: made for made in (shear_x, shear_y, translate_x, translate_y, rotate)}


def _moved(images: Tensor, amount: Tensor, counts: Sequence[int], fill: Tensor) -> Tensor:
    theta = torch.eye(2, 3, device=images.device, dtype=images.dtype).repeat(len(images), 1, 1)
    for make, matrix, amounts in zip(MOVES.values(), theta.split(counts), amount.flatten().split(counts), strict=True):
        for (i, j), value in make(amounts).items():
            matrix[:, i, j] = value
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    colour = fill.to(images.dtype)[:, None, None]
    return (F.grid_sample(images - colour, grid, align_corners=False) + colour).clamp(0, 1)


# The image that another is blended with, or taken further away from


def brightness(images: Tensor) -> Tensor:
    """Black."""
    return images.new_zeros(1)


def color(images: Tensor) -> Tensor:
    """Its grey."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def contrast(images: Tensor) -> Tensor:
    """The mean of its grey."""
    return color(images).mean((1, 2, 3), keepdim=True)


def sharpness(images: Tensor) -> Tensor:
    """Smoothed as by Pillow's SMOOTH."""
    kernel = images.new_ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5.0
    return F.conv2d(F.pad(images, (1,) * 4, mode="replicate"), kernel / 13, groups=3)


BLENDS = {made.__name__: made for made in (brightness, color, contrast, sharpness)}


def _blended(images: Tensor, amount: Tensor, counts: Sequence[int]) -> Tensor:
    parts = zip(BLENDS.values(), images.split(counts), strict=True)
    other = torch.cat([make(part).expand_as(part) for make, part in parts if len(part)])
    return (other + (1 + BLEND * amount) * (images - other)).clamp(0, 1)


OPERATIONS = (*UNMOVED, *MOVES, *BLENDS)


def random_erase(images: Tensor, probability: float, fill: Tensor) -> Tensor:
    """A rectangle of each image, with this probability, in one colour: 2 to 33 % of the area, sides in proportions of
    0.3 to 3.3 (Zhong et al. 2020, arXiv:1708.04896).

    Args:
        images: float `(b, c, h, w)`. probability: of an image. fill: `(c)`.
    """
    b, _, h, w = images.shape
    area, ratio, y, x, chance = torch.rand(5, b, 1, device=images.device)
    area = (0.02 + area * (0.33 - 0.02)) * h * w
    ratio = torch.exp((ratio * 2 - 1) * math.log(3.3))
    tall, broad = (area * ratio).sqrt().clamp(max=h), (area / ratio).sqrt().clamp(max=w)
    top, left = y * (h - tall), x * (w - broad)
    rows, columns = torch.arange(h, device=images.device) + 0.5, torch.arange(w, device=images.device) + 0.5
    inside = ((rows >= top) & (rows < top + tall))[:, :, None] & ((columns >= left) & (columns < left + broad))[:, None]
    inside = inside & (chance < probability)[..., None]
    return torch.where(inside[:, None], fill.to(images.dtype)[:, None, None], images)
