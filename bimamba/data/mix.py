"""Mixing two images of a batch, and their labels alike: mixup and CutMix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mix(nn.Module):
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of whole batches, on the device they are on.

    With both switched on, each batch draws one of the two. Every image draws its own share `λ ~ Beta(alpha, alpha)` and
    its own rectangle, all of them at once: kornia's version loops over the images. An image is mixed with the one
    before it in the (shuffled) batch, which costs no permutation. Random numbers come from torch's global generators.

    Args:
        mixup: alpha; 0: off. 0.2 to 0.8 are usual.
        cutmix: alpha; 0: off. 1 is usual.
        probability: of an image being mixed.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, mixup: float = 0.0, cutmix: float = 0.0, probability: float = 1.0) -> None:
        super().__init__()
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if value < 0:
                raise ValueError(f"data.mix.{name}: expected alpha above 0, or 0 for off, got {value}")
        if not 0 <= probability <= 1:
            raise ValueError(f"data.mix.probability: expected a number in [0, 1], got {probability}")
        self.mixup, self.cutmix, self.probability = mixup, cutmix, probability

    @property
    def on(self) -> bool:
        """Whether anything is mixed at all."""
        return self.probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    def forward(self, images: Tensor, label: Tensor, classes: int | None) -> tuple[Tensor, Tensor]:
        """Images float `(b, c, h, w)`, and labels as of the batch.

        Args:
            images: the batch.
            label: int64 `(b,)` or float `(b, k)`.
            classes: of a multiclass problem; None for the others.

        Returns:
            The images, and labels as shares: multiclass float `(b, classes)`, which sum to 1; binary float `(b,)`;
            multilabel and regression float `(b, k)`.
        """
        cut = self.cutmix > 0 and (self.mixup == 0 or bool(torch.rand(()) < 0.5))  # on the host: no wait for the device
        alpha = self.cutmix if cut else self.mixup
        share = _beta(alpha, len(images), images.device)
        share = torch.where(torch.rand(len(images), device=images.device) < self.probability, share, 1.0)
        other = images.roll(1, 0)
        if cut:
            own = _outside_a_rectangle(share, *images.shape[-2:])
            images, share = torch.where(own[:, None], images, other), own.float().mean((1, 2))
        else:
            weight = share[:, None, None, None]
            images = weight * images + (1 - weight) * other
        target = F.one_hot(label, classes).float() if classes is not None else label.float()
        share = share.view(-1, *[1] * (target.dim() - 1))
        return images, share * target + (1 - share) * target.roll(1, 0)


def _beta(alpha: float, n: int, device: torch.device) -> Tensor:
    both = torch.full((n,), float(alpha), device=device)
    return torch.distributions.Beta(both, both, validate_args=False).sample()


def _outside_a_rectangle(share: Tensor, height: int, width: int) -> Tensor:
    """bool `(b, h, w)`, False in a rectangle of about `1 - share` of the area, in the image's proportions."""
    side = (1 - share).sqrt()
    inside = torch.ones(len(share), 1, 1, dtype=torch.bool, device=share.device)
    for dim, size in ((1, height), (2, width)):
        middle = torch.rand(len(share), device=share.device) * size
        low, high = (middle - side * size / 2).round(), (middle + side * size / 2).round()
        shape = (1, size, 1) if dim == 1 else (1, 1, size)
        at = torch.arange(size, device=share.device).view(shape)
        inside = inside & (at >= low[:, None, None]) & (at < high[:, None, None])
    return ~inside
