"""Gradient × input of images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradient_times_input(score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """First-order share of each pixel in a score, summed over the channels (Shrikumar et al. 2016, arXiv:1605.01713).

    The baseline is an input of zero: for normalised images a picture of the data's mean colour.

    Args:
        score: maps `(b, c, height, width)` to `(b)`; each row's score must depend on that row alone.
        images: `(b, c, height, width)`, float, as the network takes them.

    Returns:
        `(b, height, width)`; positive: raises the score.
    """
    with torch.enable_grad():
        inputs = images.detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(score(inputs).sum(), inputs)
    return (gradient * inputs).sum(1).detach()
