"""TrivialAugment and random erasing of whole batches.

The images of a batch are sorted by the operation that each has drawn, and every operation then runs once, on those that
drew it: no loop over images, and no operation that is computed for nothing. Operations are drawn on the host, so nobody
waits for the device to say how many images got which.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
    if operation is None:
        operation = torch.randint(len(OPERATIONS), (len(images),))
        operation[torch.rand(len(images)) >= probability] = 0
    strength = torch.rand(len(images), 1, 1, 1, device=images.device)
    strength = torch.where(torch.rand_like(strength) < 0.5, strength, -strength)
    order = operation.argsort().to(images.device, non_blocking=True)
    counts = operation.bincount(minlength=len(OPERATIONS)).tolist()
    done = [
        make(part, amount, fill) if len(part) else part
        for make, part, amount in zip(
            OPERATIONS.values(), images[order].split(counts), strength[order].split(counts), strict=True
        )
    ]
    result = torch.empty_like(images)
    result[order] = torch.cat(done)
    return result


# Operations: images float (n, 3, h, w) in [0, 1], amount (n, 1, 1, 1) in [-1, 1], the colour to fill with (3).


def identity(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """As it is."""
    return images


def shear_x(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Rows slide along."""
    return _moved(images, fill, [[1, SHEAR * amount, 0], [0, 1, 0]])


def shear_y(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Columns slide along."""
    return _moved(images, fill, [[1, 0, 0], [SHEAR * amount, 1, 0]])


def translate_x(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Moved to a side."""
    return _moved(images, fill, [[1, 0, 2 * SHIFT * amount], [0, 1, 0]])  # in affine_grid a side is 2 long


def translate_y(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Moved up or down."""
    return _moved(images, fill, [[1, 0, 0], [0, 1, 2 * SHIFT * amount]])


def rotate(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Turned around the centre."""
    angle = math.radians(DEGREES) * amount
    return _moved(images, fill, [[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]])


def _moved(images: Tensor, fill: Tensor, matrix: list[list[Tensor | float]]) -> Tensor:
    theta = images.new_empty(len(images), 2, 3)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            theta[:, i, j] = value.view(-1) if isinstance(value, Tensor) else value
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    colour = fill.to(images.dtype)[:, None, None]
    return (F.grid_sample(images - colour, grid, align_corners=False) + colour).clamp(0, 1)


def brightness(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Towards or away from black."""
    return _away_from(torch.zeros_like(images), images, amount)


def color(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Towards or away from grey."""
    return _away_from(_grey(images), images, amount)


def contrast(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Towards or away from the mean grey."""
    return _away_from(_grey(images).mean((1, 2, 3), keepdim=True), images, amount)


def sharpness(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Towards or away from the image smoothed as Pillow's SMOOTH does."""
    kernel = images.new_ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5.0
    smooth = F.conv2d(F.pad(images, (1,) * 4, mode="replicate"), kernel / 13, groups=3)
    return _away_from(smooth, images, amount)


def _away_from(without: Tensor, images: Tensor, amount: Tensor) -> Tensor:
    return (without + (1 + BLEND * amount) * (images - without)).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def posterize(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Only the 2 to 8 highest bits of each value."""
    size = 2.0 ** (amount.abs() * (8 - BITS)).round()  # of a step
    return ((images * 255).round() / size).floor() * size / 255


def solarize(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Values above a threshold are turned around."""
    return torch.where(images >= 1 - amount.abs(), 1 - images, images)


def autocontrast(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Each channel's darkest value becomes 0 and its lightest 1; a channel of one value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def equalize(images: Tensor, amount: Tensor, fill: Tensor) -> Tensor:
    """Each channel's 256 values spread so that all are about equally frequent, as Pillow does it."""
    values = (images * 255).round().long().flatten(2)  # n 3 hw
    counts = images.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, images.new_ones(values.shape))
    last = counts.gather(2, values.amax(2, keepdim=True))
    step = ((values.shape[2] - last) / 255).floor()
    before = counts.cumsum(2) - counts
    table = ((before + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, 255) / 255
    return torch.where((step > 0)[..., None], table.gather(2, values).view_as(images), images)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    made.__name__: made
    for made in (
        *(identity, shear_x, shear_y, translate_x, translate_y, rotate, brightness, color, contrast, sharpness),
        *(posterize, solarize, autocontrast, equalize),
    )
}


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
