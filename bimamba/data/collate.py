"""The one place where rows become a batch.

A batch is a dict: `inputs` (uint8 images `(b, c, height, width)`, made float by the DataModule after the transfer, or
int64 token ids `(b, l)`, 0 = padding), `mask` (bool `(b, l)`, sequences only), `label` (absent when unknown), `id`
(list of str). A packed batch also holds the fields of a `bimamba.packing.Packing`: `seq_idx`, `bounds`, `order`; its
inputs and mask have fewer rows than there are labels.
"""

from __future__ import annotations

from typing import Any

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
    """Rows of one flat array, padded with 0 at the end. No loop over rows.

    Args:
        flat: integers `(total,)`.
        starts, lengths: int64 `(b,)`.
        pad_to_multiple: the padded length is the longest row, rounded up to a multiple of this.

    Returns:
        int64 `(b, l)` and the mask, bool `(b, l)`, True = real.
    """
    longest = int(lengths.max())
    longest = -(-longest // pad_to_multiple) * pad_to_multiple
    columns = torch.arange(longest)
    mask = columns < lengths[:, None]  # b l
    rows = torch.zeros(len(lengths), longest, dtype=torch.int64)
    rows[mask] = flat[(starts[:, None] + columns)[mask]].long()
    return rows, mask


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
    counts = lengths.numpy()
    row, start = plan(counts, pack_length)
    widest = int((start + counts).max())
    l = -(-widest // pad_to_multiple) * pad_to_multiple
    packing = describe(row, start, counts, l)
    offset = torch.arange(int(lengths.sum())) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    place = torch.from_numpy(row * l + start)
    rows = torch.zeros(int(row.max()) + 1, l, dtype=torch.int64)
    source = torch.repeat_interleave(starts, lengths) + offset
    rows.view(-1)[torch.repeat_interleave(place, lengths) + offset] = flat[source].long()
    return rows, torch.arange(l) < packing.bounds[:, -1:], packing
