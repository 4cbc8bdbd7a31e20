"""A loader that can begin in mid-epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader


class TrainLoader(DataLoader):
    """A `DataLoader` over `TrainBatches` that leaves out the batches of the epoch that are done already.

    It begins when the first batch is asked for. Lightning calls `iter()` long before that, at a time when a resumed
    training does not know its epoch yet, and worker processes would go ahead with the wrong rows.

    Args:
        begin: how many batches of this epoch are done.
        options: those of `DataLoader`; `sampler` is a `TrainBatches`.
    """

    def __init__(self, *, begin: Callable[[], int], **options: Any) -> None:
        super().__init__(**options)
        self.begin = begin

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.sampler.begin = self.begin()  # type: ignore[attr-defined]  # a TrainBatches
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: epoch and batch are in the checkpoint already. Its presence tells Lightning that this can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
