"""From tokens to one vector a sequence, padding excluded.

A pooling has two steps: `insert` may add tokens before the first block, `forward` pools after the last one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Pooling(nn.Module):
    """Base: `insert` leaves the tokens as they are."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def insert(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x: `(b, l, d)`, mask: `(b, l)` bool or None, both maybe with more tokens."""
        return x, mask


class MeanPooling(Pooling):
    """The mean of the real tokens: `(b, l, d)` to `(b, d)`."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return x.mean(dim=1)
        keep = mask[..., None].to(x.dtype)
        return torch.where(mask[..., None], x, 0.0).sum(dim=1) / keep.sum(dim=1).clamp(min=1.0)


class MaxPooling(Pooling):
    """The largest value of each channel among the real tokens."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return (x if mask is None else x.masked_fill(~mask[..., None], -torch.inf)).amax(dim=1)


class AttentionPooling(Pooling):
    """A learned score a token, softmax over the real tokens (Ilse et al. 2018, arXiv:1802.04712, without gate)."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.score = nn.Sequential(nn.Linear(d_model, d_model), nn.Tanh(), nn.Linear(d_model, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        score = self.score(x)
        if mask is not None:
            score = score.masked_fill(~mask[..., None], -torch.inf)
            x = torch.where(mask[..., None], x, 0.0)
        return (score.softmax(dim=1) * x).sum(dim=1)


class ClassTokenPooling(Pooling):
    """A learned token in the middle of the real ones, read after the last block.

    In the middle both directions have seen half of the sequence when they reach it (Zhu et al. 2024, arXiv:2401.09417).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.token = nn.Parameter(torch.empty(d_model).normal_(std=0.02))
        self.token._no_weight_decay = True

    def insert(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        middle = self._middle(x.shape[1], mask, x)
        position = torch.arange(x.shape[1] + 1, device=x.device)
        # token i of the longer sequence comes from i before the middle, from i - 1 behind it
        source = (position - (position > middle).long()).clamp(max=x.shape[1] - 1)
        x = x.gather(1, source[..., None].expand(x.shape[0], -1, x.shape[2]))
        x = torch.where((position == middle)[..., None], self.token.to(x.dtype), x)
        if mask is not None:
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)  # padding is at the end: one real token more
        return x, mask

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        middle = self._middle(x.shape[1] - 1, None if mask is None else mask[:, 1:], x)
        return x.gather(1, middle[..., None].expand(-1, 1, x.shape[2])).squeeze(1)

    @staticmethod
    def _middle(l: int, mask: Tensor | None, x: Tensor) -> Tensor:
        """Number of tokens before the class token, `(b, 1)`; `l` and `mask` are those without it."""
        if mask is None:
            return torch.full((x.shape[0], 1), l // 2, device=x.device)
        return mask.sum(dim=1, keepdim=True) // 2
