"""Sequences in tables: the user's own, and those of the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bimamba.data.records import Records
from bimamba.data.sources.reading import read_sequences, table_records
from bimamba.data.sources.rows import hub_splits, load_rows


class SequenceTable:
    """Parquet, CSV, TSV, JSON lines (also gzipped), or a data set of the Hub, with one sequence a row.

    Args:
        hub: name on the Hub, used where `data.path` is not set; `{task}` in it stands for `data.task`.
        sequence_column: column of the sequences.
        label_column: column of the labels, or a list of them (multilabel, regression).
        id_column: column of the names of rows; None: file name and row number.
        split_column: column that says train, val or test.
        split_names: `{split: name in the data set}` where the usual names do not fit.
        cache_dir: where downloads go.
    """

    def __init__(
        self,
        hub: str | None = None,
        sequence_column: str = "sequence",
        label_column: str | Sequence[str] = "label",
        id_column: str | None = None,
        split_column: str | None = None,
        split_names: Mapping[str, str] | None = None,
        cache_dir: str | None = None,
    ) -> None:
        self.hub, self.sequence_column = hub, sequence_column
        self.label_columns = [label_column] if isinstance(label_column, str) else list(label_column)
        self.id_column, self.split_column, self.split_names = id_column, split_column, split_names
        self.cache_dir = cache_dir

    def prepare(self, path: str | None, task: str | None) -> None:
        """Downloads from the Hub unless there is a local copy."""
        if path is None and self.hub is not None:
            name, config = self._hub(task)
            hub_splits(str(name), config, self.cache_dir)

    def load(self, path: str | None, task: str | None) -> Records:
        """All rows.

        Raises:
            ValueError: see `Source.load`.
        """
        hub, config = self._hub(task)
        rows, names = load_rows(
            hub=hub,
            path=path,
            task=task if path is not None else config,
            columns=[self.sequence_column, *self.label_columns, *([self.id_column] if self.id_column else [])],
            text=[self.sequence_column, *([self.id_column] if self.id_column else [])],
            split_column=self.split_column,
            split_names=self.split_names,
            cache_dir=self.cache_dir,
        )
        return table_records(rows, self.sequence_column, self.label_columns, self.id_column, names)

    def read(self, path: str) -> Records:
        """Rows of a table, with labels where it has the columns; or of FASTA files."""
        return read_sequences(path, self.sequence_column, self.label_columns, self.id_column)

    def _hub(self, task: str | None) -> tuple[str | None, str | None]:
        if self.hub is not None and "{task}" in self.hub:
            if task is None:
                raise ValueError(f"data.task is not set: expected the part of the name in {self.hub}")
            return self.hub.format(task=task), None
        return self.hub, task
