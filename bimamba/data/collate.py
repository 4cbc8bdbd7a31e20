"""The one place where rows become a batch.

A batch is a dict: `inputs` (uint8 images `(b, c, height, width)`, made float by the DataModule after the transfer, or
int64 token ids `(b, l)`, 0 = padding), `mask` (bool `(b, l)`, sequences only), `label` (absent when unknown), `id`
(list of str).
"""

from __future__ import annotations

from typing import Any

import torch

Batch = dict[str, Any]


def collate(
    inputs: torch.Tensor, ids: list[str], label: torch.Tensor | None, mask: torch.Tensor | None = None
) -> Batch:
    """The batch dict; keys of what is unknown are left out."""
    batch: Batch = {"inputs": inputs}
    if mask is not None:
        batch["mask"] = mask
    if label is not None:
        batch["label"] = label
    batch["id"] = ids
    return batch


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
