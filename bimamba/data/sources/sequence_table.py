"""Sequences in tables: the user's own, and those of the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bimamba.data.records import Records
from bimamba.data.sources.reading import read_sequences, table_records
from bimamba.data.sources.table import TableSource


class SequenceTable(TableSource):
    """Parquet, CSV, TSV, JSON lines (also gzipped), or a data set of the Hub, with one sequence a row.

    Args:
        hub: name on the Hub, used where `data.path` is not set; `{task}` in it stands for `data.task`.
        sequence_column: column of the sequences.
        label_column, id_column, split_column, split_names, cache_dir, group_column: see `TableSource`.
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
        group_column: str | None = None,
    ) -> None:
        super().__init__(
            hub, sequence_column, label_column, id_column, split_column, split_names, cache_dir, group_column
        )

    def load(self, path: str | None, task: str | None) -> Records:
        """All rows.

        Raises:
            ValueError: see `Source.load`.
        """
        rows, names = self.rows(path, task, text=True)
        records = table_records(rows, self.input_column, self.label_columns, self.id_column, names)
        records.groups = self.groups(rows)
        return records

    def read(self, path: str) -> Records:
        """Rows of a table, with labels where it has the columns; or of FASTA files."""
        return read_sequences(path, self.input_column, self.label_columns, self.id_column)
