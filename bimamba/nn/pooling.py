"""From tokens to one vector a sequence, padding excluded; where there is nothing but padding, zeros, or what is made of
the class token alone.

A pooling has two steps: `insert` may add tokens before the first block, `forward` pools after the last one. In a packed
batch (`bimamba.packing`) both serve each sequence of a row by itself, with matrix products over `(slots, l)` instead of
scattered sums: those add in another order at each run on a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba.nn.decay import undecayed
from bimamba.packing import Packing, members, pick


class Pooling(nn.Module):
    """Base: `insert` leaves the tokens as they are."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def insert(
        self, x: Tensor, mask: Tensor | None, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor | None, Packing | None]:
        """x: `(b, l, d)`, mask: `(b, l)` bool or None, packing or None; all of them maybe with more tokens."""
        return x, mask, packing


class MeanPooling(Pooling):
    """The mean of the real tokens: `(b, l, d)` to `(b, d)`; packed to `(n, d)`."""

    def forward(self, x: Tensor, mask: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        if packing is not None:
            keep = members(packing)
            return pick(_mix(keep, x, keep) / keep.sum(-1, keepdim=True).clamp(min=1), packing)
        if mask is None:
            return x.mean(dim=1)
        # float16 holds neither the sum nor the number of many tokens
        total = torch.where(mask[..., None], x, 0.0).sum(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
        return (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).to(x.dtype)


class TokenPooling(Pooling):
    """None: the tokens as they are, `(b, l, d)`, for an output a token (masked-token pretraining)."""

    def forward(self, x: Tensor, mask: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        return x


class MaxPooling(Pooling):
    """The largest value of each channel among the real tokens."""

    def forward(self, x: Tensor, mask: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        if packing is not None:
            x = x.masked_fill(~members(packing).any(1)[..., None], -torch.inf)
            least = x.new_full((x.shape[0], packing.bounds.shape[1] - 1, x.shape[2]), -torch.inf)
            largest = least.scatter_reduce(1, packing.seq_idx.long()[..., None].expand_as(x), x, "amax")
            return pick(largest.masked_fill(_empty(packing), 0.0), packing)
        if mask is None:
            return x.amax(dim=1)
        largest = x.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
        return largest.masked_fill(~mask.any(dim=1, keepdim=True), 0.0)


class AttentionPooling(Pooling):
    """A learned score a token, softmax over the real tokens (Ilse et al. 2018, arXiv:1802.04712, without gate)."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.score = nn.Sequential(nn.Linear(d_model, d_model), nn.Tanh(), nn.Linear(d_model, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        score = self.score(x)
        least = torch.finfo(score.dtype).min  # not -inf: where no token is real, that would become NaN
        if packing is not None:
            keep = members(packing)
            score = score.mT.expand(keep.shape).masked_fill(~keep, least)
            mean = _mix(score.softmax(dim=-1), x, keep)
            return pick(mean.masked_fill(_empty(packing), 0.0), packing)
        if mask is not None:
            score = score.masked_fill(~mask[..., None], least)
            x = torch.where(mask[..., None], x, 0.0)
        return (score.softmax(dim=1) * x).sum(dim=1)


class ClassTokenPooling(Pooling):
    """A learned token in the middle of the real ones, read after the last block; packed: in each sequence's middle.

    In the middle both directions have seen half of the sequence when they reach it (Zhu et al. 2024, arXiv:2401.09417).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.token = nn.Parameter(torch.empty(d_model))
        undecayed(self, "token")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.token, std=0.02)

    def insert(
        self, x: Tensor, mask: Tensor | None, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor | None, Packing | None]:
        if packing is not None:
            return self._insert_packed(x, packing)
        middle = self._middle(x.shape[1], mask, x)
        position = torch.arange(x.shape[1] + 1, device=x.device)
        # token i of the longer sequence comes from i before the middle, from i - 1 behind it
        source = (position - (position > middle).long()).clamp(max=x.shape[1] - 1)
        x = x.gather(1, source[..., None].expand(x.shape[0], -1, x.shape[2]))
        x = torch.where((position == middle)[..., None], self.token.to(x.dtype), x)
        if mask is not None:
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)  # padding is at the end: one real token more
        return x, mask, None

    def _insert_packed(self, x: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Packing]:
        """Each sequence is one longer, a row by as many tokens as the fullest row has sequences."""
        slots = packing.bounds.shape[1] - 1
        real = packing.bounds.diff(dim=1) > 0
        added = torch.cat([torch.zeros_like(real[:, :1]), real], dim=1).cumsum(1)  # tokens put in before each bound
        bounds = packing.bounds + added
        position = torch.arange(x.shape[1] + slots, device=x.device)
        number = (position >= bounds[:, 1:, None]).sum(1)
        number = torch.minimum(number, added[:, -1:] - 1)  # padding carries the last sequence's
        packing = Packing(number.int(), bounds, packing.order)
        middle = self._middles(packing).gather(1, number)
        source = position - number - (position > middle).long()
        x = x.gather(1, source.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2]))
        x = torch.where((position == middle)[..., None], self.token.to(x.dtype), x)
        return x, position < bounds[:, -1:], packing

    def forward(self, x: Tensor, mask: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        if packing is not None:
            middles = self._middles(packing).clamp(max=x.shape[1] - 1)  # of a slot without a sequence: never read
            return pick(x.gather(1, middles[..., None].expand(-1, -1, x.shape[2])), packing)
        middle = self._middle(x.shape[1] - 1, None if mask is None else mask[:, 1:], x)
        return x.gather(1, middle[..., None].expand(-1, 1, x.shape[2])).squeeze(1)

    @staticmethod
    def _middle(l: int, mask: Tensor | None, x: Tensor) -> Tensor:
        """Number of tokens before the class token, `(b, 1)`; `l` and `mask` are those without it."""
        if mask is None:
            return torch.full((x.shape[0], 1), l // 2, device=x.device)
        return mask.sum(dim=1, keepdim=True) // 2

    @staticmethod
    def _middles(packing: Packing) -> Tensor:
        """Place of each sequence's class token in its row, `(rows, slots)`; the packing counts it."""
        return packing.bounds[:, :-1] + (packing.bounds.diff(dim=1) - 1).clamp(min=0) // 2


def _empty(packing: Packing) -> Tensor:
    """Slots without a token, `(rows, slots, 1)`."""
    return packing.bounds.diff(dim=1)[..., None] == 0


PIECE = 256  # tokens: products of few rows and one long sum leave most of a GPU idle


def _mix(weight: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """`(rows, slots, l)` times `(rows, l, d)`, in float32 at least; what stands at padding does not count."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    beyond = -x.shape[1] % PIECE
    weight, x, keep = F.pad(weight, (0, beyond)), F.pad(x, (0, 0, 0, beyond)), F.pad(keep, (0, beyond))
    real = torch.where(keep.any(1)[..., None], x, 0.0).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        pieces = weight.to(dtype).unflatten(2, (-1, PIECE)).transpose(1, 2) @ real.unflatten(1, (-1, PIECE))
        return pieces.sum(1).to(x.dtype)
