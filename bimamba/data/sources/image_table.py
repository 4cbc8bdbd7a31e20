"""Images in tables, as the Hub keeps them: CIFAR, MNIST, ImageNet, and the user's own Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bimamba.data.records import Records
from bimamba.data.sources.reading import image_table_records, read_images
from bimamba.data.sources.table import TableSource


class ImageTable(TableSource):
    """A data set of the Hub, or Parquet with one image a row (struct of `bytes` and `path`, binary, or a file name).

    Args:
        hub: name on the Hub, used where `data.path` is not set.
        image_column: column of the images.
        label_column, id_column, split_column, split_names, cache_dir, group_column: see `TableSource`.
    """

    def __init__(
        self,
        hub: str | None = None,
        image_column: str = "image",
        label_column: str | Sequence[str] = "label",
        id_column: str | None = None,
        split_column: str | None = None,
        split_names: Mapping[str, str] | None = None,
        cache_dir: str | None = None,
        group_column: str | None = None,
    ) -> None:
        super().__init__(hub, image_column, label_column, id_column, split_column, split_names, cache_dir, group_column)

    def load(self, path: str | None, task: str | None) -> Records:
        """All rows.

        Raises:
            ValueError: see `Source.load`.
        """
        rows, names = self.rows(path, task, text=False)
        root = None if path is None else Path(path).expanduser()
        records = image_table_records(rows, self.input_column, self.label_columns, self.id_column, names, root)
        records.groups = self.groups(rows)
        return records

    def read(self, path: str) -> Records:
        """Images to predict: files, npz or a table."""
        return read_images(path, self.input_column, self.label_columns, self.id_column)
