"""The one place where rows become a batch.

A batch is a dict: `inputs` (uint8 images `(b, c, height, width)`, made float by the DataModule after the transfer, or
int64 token ids `(b, l)`, 0 = padding), `mask` (bool `(b, l)`, sequences only), `label` (absent when unknown), `id`
(list of str). A packed batch also holds the fields of a `bimamba.packing.Packing`: `seq_idx`, `bounds`, `order`; its
inputs and mask have fewer rows than there are labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bimamba.packing import Packing, describe, plan

Batch = dict[str, Any]


def collate(
    inputs: torch.Tensor,
    ids: list[str],
    label: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    packing: Packing | None = None,
) -> Batch:
    """The batch dict; keys of what is unknown are left out."""
    batch: Batch = {"inputs": inputs}
    if mask is not None:
        batch["mask"] = mask
    if packing is not None:
        batch |= packing._asdict()
    if label is not None:
        batch["label"] = label
    batch["id"] = ids
    return batch


def packing_in(batch: Batch) -> Packing | None:
    """Where the sequences of a batch lie, None if it is not packed."""
    return Packing(*(batch[name] for name in Packing._fields)) if "seq_idx" in batch else None


def pad_rows(
    flat: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, pad_to_multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one flat array, padded with 0 at the end.

    A slice a row: for rows of hundreds of tokens ten times as fast as one gather of all of them, for which an index a
    token has to be written first (of 30 tokens as fast), and no threads, which a loader's worker does not have.

    Args:
        flat: integers `(total,)`.
        starts, lengths: int64 `(b,)`.
        pad_to_multiple: the padded length is the longest row, rounded up to a multiple of this.

    Returns:
        int64 `(b, l)` and the mask, bool `(b, l)`, True = real.

    Raises:
        IndexError: a row ends beyond the array.
    """
    _expect_within(flat, starts, lengths)
    longest = int(lengths.max())
    longest = -(-longest // pad_to_multiple) * pad_to_multiple
    rows, tokens = np.zeros((len(lengths), longest), np.int64), flat.numpy()
    for row, start, length in zip(rows, starts.tolist(), lengths.tolist(), strict=True):
        row[:length] = tokens[start : start + length]
    return torch.from_numpy(rows), torch.from_numpy(np.arange(longest) < lengths.numpy()[:, None])


def pack_rows(
    flat: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, pack_length: int, pad_to_multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor, Packing]:
    """Pieces of one flat array, several to a row of at most `pack_length`; see `bimamba.packing.plan`.

    Args:
        flat, starts, lengths, pad_to_multiple: as of `pad_rows`.
        pack_length: the most tokens of a row. The width of the rows is that of the fullest.

    Returns:
        int64 `(rows, l)`, the mask, bool `(rows, l)`, and where each piece lies.
    """
    _expect_within(flat, starts, lengths)
    counts = lengths.numpy()
    row, start = plan(counts, pack_length)
    widest = int((start + counts).max())
    l = -(-widest // pad_to_multiple) * pad_to_multiple
    packing = describe(row, start, counts, l)
    rows, tokens = np.zeros((int(row.max()) + 1, l), np.int64), flat.numpy()
    for i, at, begin, length in zip(row.tolist(), start.tolist(), starts.tolist(), counts.tolist(), strict=True):
        rows[i, at : at + length] = tokens[begin : begin + length]
    return torch.from_numpy(rows), torch.from_numpy(np.arange(l) < packing.bounds[:, -1:].numpy()), packing


def _expect_within(flat: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> None:
    """A slice beyond the end would be shorter, and of one token NumPy would fill a row with it."""
    end = int((starts + lengths).max())
    if end > len(flat):
        raise IndexError(f"expected rows within {len(flat)} tokens, got one that ends at {end}")
