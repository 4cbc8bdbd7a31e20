"""Several sequences in one row: the plan (which sequence lies where) and the index arithmetic that follows from it.

A packed batch holds `n` sequences in `rows` rows of `l` tokens, padding at the end of each row. What belongs to whom is
said by a `Packing`; data, embedding, mixers and pooling read it, each what it needs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the sequences of a packed batch lie. `slots` is their number in the row that holds most of them.

    Args:
        seq_idx: int32 `(rows, l)`, number of the token's sequence within its row; padding carries the last one's.
        bounds: int64 `(rows, slots + 1)`, first token of each sequence and, at last, the number of real tokens;
            a row of fewer sequences repeats it.
        order: int64 `(n)`: sequence i of the batch, whose label is `label[i]`, is `row * slots + number in the row`.
    """

    seq_idx: Tensor
    bounds: Tensor
    order: Tensor


def plan(lengths: np.ndarray, pack_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Row of each sequence, and its first token there, by first-fit decreasing and then levelled.

    First-fit decreasing (Johnson 1973) says how many rows suffice; giving the next longest sequence to the emptiest of
    as many rows levels them, and a batch is only as wide as its fullest row: with 64 sequences of 331 to 4,776 tokens
    and four times that for `pack_length`, padding falls from 6.4 % to 1.4 % of the batch. Depends on the lengths alone.

    Args:
        lengths: int64 `(n)`. pack_length: the most tokens of a row.

    Returns:
        int64 `(n)` each. Within a row the sequences keep the order of the batch.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    longest = int(lengths.max())
    if longest > pack_length:
        raise ValueError(f"data.pack_length: expected at least the longest sequence, {longest}, got {pack_length}")
    decreasing = np.argsort(-lengths, kind="stable")
    row = np.zeros(len(lengths), np.int64)
    filled = np.zeros(len(lengths), np.int64)  # never more rows than sequences
    for i in decreasing:
        row[i] = np.argmax(filled + lengths[i] <= pack_length)
        filled[row[i]] += lengths[i]
    filled = filled[: row.max() + 1]
    levelled, level = np.zeros_like(row), np.zeros_like(filled)
    for i in decreasing:
        levelled[i] = np.argmin(level)
        level[levelled[i]] += lengths[i]
    if level.max() < filled.max():
        row = levelled
    start = np.zeros_like(row)
    by_row = np.argsort(row, kind="stable")
    before = np.cumsum(lengths[by_row]) - lengths[by_row]
    first = np.searchsorted(row[by_row], row[by_row])  # of its row
    start[by_row] = before - before[first]
    return row, start


def describe(row: np.ndarray, start: np.ndarray, lengths: np.ndarray, l: int) -> Packing:
    """The `Packing` of a plan, rows of `l` tokens wide."""
    by_row = np.argsort(row, kind="stable")
    number = np.empty_like(row)
    number[by_row] = np.arange(len(row)) - np.searchsorted(row[by_row], row[by_row])
    rows, slots = int(row.max()) + 1, int(number.max()) + 1
    bounds = np.zeros((rows, slots + 1), np.int64)
    bounds[row, number + 1] = start + lengths
    np.maximum.accumulate(bounds, axis=1, out=bounds)
    seq_idx = np.repeat((np.bincount(row) - 1).astype(np.int32)[:, None], l, axis=1)
    for i, at, length, k in zip(row.tolist(), start.tolist(), lengths.tolist(), number.tolist(), strict=True):
        seq_idx[i, at : at + length] = k
    return Packing(*map(torch.from_numpy, (seq_idx, bounds, row * slots + number)))


def packing_of(seq_idx: Tensor, mask: Tensor | None = None) -> Packing:
    """The `Packing` of a row's `seq_idx` alone, sequences in the order of rows. Waits for the device.

    Args:
        seq_idx: ints `(rows, l)`, not decreasing along a row. mask: bool `(rows, l)`, padding at the end.
    """
    lengths = torch.full_like(seq_idx[:, 0], seq_idx.shape[1]) if mask is None else mask.sum(1)
    tokens = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    new = torch.ones_like(seq_idx, dtype=torch.bool)
    new[:, 1:] = seq_idx.diff(dim=1) != 0
    new &= tokens < lengths[:, None]
    count = new.sum(1)
    slots = int(count.max())
    number = new.long().cumsum(1) - 1
    bounds = lengths.long()[:, None].expand(-1, slots + 1).clone()
    rows, first = new.nonzero(as_tuple=True)
    bounds[rows, number[rows, first]] = first
    return Packing(number.int(), bounds, rows * slots + number[rows, first])


def segment(packing: Packing) -> tuple[Tensor, Tensor]:
    """First token of each token's sequence, and the token behind its last, int64 `(rows, l)` each."""
    index = packing.seq_idx.long()
    return packing.bounds[:, :-1].gather(1, index), packing.bounds[:, 1:].gather(1, index)


def positions(packing: Packing) -> Tensor:
    """Position of each token in its own sequence, int64 `(rows, l)`; 0 at padding."""
    first, end = segment(packing)
    tokens = torch.arange(first.shape[1], device=first.device)
    return torch.where(tokens < end, tokens - first, 0)


def members(packing: Packing) -> Tensor:
    """Which tokens are a sequence's: bool `(rows, slots, l)`; padding is nobody's."""
    tokens = torch.arange(packing.seq_idx.shape[1], device=packing.bounds.device)
    bounds = packing.bounds[..., None]
    return (tokens >= bounds[:, :-1]) & (tokens < bounds[:, 1:])


def pick(values: Tensor, packing: Packing) -> Tensor:
    """From a value a slot, `(rows, slots, ...)`, to one a sequence in the batch's order, `(n, ...)`."""
    return values.flatten(0, 1).index_select(0, packing.order)


def mirror(l: int, mask: Tensor | None, packing: Packing | None, device: torch.device) -> Tensor:
    """Index along the length, int64 `(b, l)` or `(1, l)`, that reads each sequence backwards and leaves padding."""
    tokens = torch.arange(l, device=device)[None]
    if packing is not None:
        first, end = segment(packing)
    elif mask is not None:
        end = mask.sum(1, keepdim=True)
        first = torch.zeros_like(end)
    else:
        return tokens.flip(1)
    return torch.where(tokens < end, first + end - 1 - tokens, tokens)
