"""What tables of images and of sequences have in common: where their rows come from, and which columns they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bimamba.data.records import group_numbers
from bimamba.data.sources.rows import hub_splits, load_rows
from bimamba.data.tables import Rows


class TableSource:
    """Rows of a data set of the Hub, or of a local table.

    Args:
        hub: name on the Hub, used where `data.path` is not set; `{task}` in it stands for `data.task`.
        input_column: column of the images or sequences.
        label_column: column of the labels, or a list of them (multilabel, regression).
        id_column: column of the names of rows; None: file name and row number.
        split_column: column that says train, val or test.
        group_column: column whose equal values (a patient, a gene family) stay in one split where splits are drawn.
        split_names: `{split: name in the data set}` where the usual names do not fit.
        cache_dir: where downloads go.
    """

    def __init__(
        self,
        hub: str | None,
        input_column: str,
        label_column: str | Sequence[str],
        id_column: str | None,
        split_column: str | None,
        split_names: Mapping[str, str] | None,
        cache_dir: str | None,
        group_column: str | None = None,
    ) -> None:
        self.hub, self.input_column = hub, input_column
        self.label_columns = [label_column] if isinstance(label_column, str) else list(label_column)
        self.id_column, self.split_column, self.split_names = id_column, split_column, split_names
        self.cache_dir, self.group_column = cache_dir, group_column

    def prepare(self, path: str | None, task: str | None) -> None:
        """Downloads from the Hub unless there is a local copy."""
        if path is None and self.hub is not None:
            name, config = self._hub(task)
            hub_splits(str(name), config, self.cache_dir)

    def rows(self, path: str | None, task: str | None, text: bool) -> tuple[Rows, Any]:
        """All rows, as of `load_rows`.

        Args:
            path, task: of the data module. text: whether the inputs are text.
        """
        hub, config = self._hub(task)
        names = [self.id_column] if self.id_column else []
        groups = [self.group_column] if self.group_column else []
        return load_rows(
            hub=hub,
            path=path,
            task=task if path is not None else config,
            columns=[self.input_column, *self.label_columns, *names, *groups],
            text=[self.input_column, *names] if text else [],
            split_column=self.split_column,
            split_names=self.split_names,
            cache_dir=self.cache_dir,
        )

    def groups(self, rows: Rows) -> np.ndarray | None:
        """`Records.groups`; None where no column says them."""
        if self.group_column is None:
            return None
        return group_numbers(rows.table[self.group_column].to_pylist(), self.group_column, rows.describe)

    def _hub(self, task: str | None) -> tuple[str | None, str | None]:
        """Name on the Hub, and its configuration."""
        if self.hub is not None and "{task}" in self.hub:
            if task is None:
                raise ValueError(f"data.task is not set: expected the part of the name in {self.hub}")
            return self.hub.format(task=task), None
        return self.hub, task
