"""Rows of a data set to explain, as batches for the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

SPLITS = ("test", "val", "predict")


class Rows:
    """Rows of one split of a data module that is set up, on a device, not augmented.

    Args:
        datamodule: of the data room. split: `test`, `val` or `predict`.
        device: of the batches. batch_size: None for the data module's.

    Raises:
        ValueError: an unknown split, or one without rows.
    """

    def __init__(self, datamodule: Any, split: str, device: torch.device, batch_size: int | None) -> None:
        if split not in SPLITS:
            raise ValueError(f"explain.split: expected one of {', '.join(SPLITS)}, got {split!r}")
        loader = getattr(datamodule, f"{split}_dataloader")()
        if not loader:
            raise ValueError(f"explain.split={split}: expected rows to explain, the data have none in this split")
        self.dataset, self.datamodule, self.device = loader.dataset, datamodule, device
        self.dataset.pack_length = None  # rows are explained one by one
        self.batch_size = batch_size or datamodule.eval_batch_size or datamodule.batch_size

    def choose(self, count: int, seed: int, ids: Sequence[str] | None = None) -> np.ndarray:
        """Positions of `count` rows: a seeded draw, the classes in turn where rows have one; a larger count adds rows
        to a smaller one. Or the rows of the given ids.

        Raises:
            ValueError: an id that is not there.
        """
        rows = self.dataset.rows
        if ids is not None:
            known = self.dataset.examples.ids.take(rows).to_pylist()
            place = {name: i for i, name in reversed(list(enumerate(known)))}
            missing = [str(i) for i in ids if str(i) not in place]
            if missing:
                raise ValueError(
                    f"explain.ids: no row {', '.join(missing)} in this split; there are {len(known)} ({known[0]}, …)"
                )
            return np.array([place[str(i)] for i in ids])
        order = np.random.default_rng(seed).permutation(len(rows))
        labels = self.dataset.examples.labels
        if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
            label = labels.numpy()[rows][order]
            turn = np.empty(len(order), np.int64)
            for value in np.unique(label):
                own = label == value
                turn[own] = np.arange(own.sum())
            order = order[np.lexsort((label, turn))]
        return order[:count]

    def batches(self, positions: np.ndarray) -> Iterator[dict[str, Any]]:
        """Batches of the rows, on the device, as the network takes them."""
        for start in range(0, len(positions), self.batch_size):
            batch = self.dataset[positions[start : start + self.batch_size]]
            batch = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            yield self.datamodule.transform(batch, training=False)
