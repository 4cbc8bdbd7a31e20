"""Images in tables, as the Hub keeps them: CIFAR, MNIST, ImageNet, and the user's own Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bimamba.data.records import Records
from bimamba.data.sources.reading import image_table_records, read_images
from bimamba.data.sources.rows import hub_splits, load_rows


class ImageTable:
    """A data set of the Hub, or Parquet with one image a row (struct of `bytes` and `path`, binary, or a file name).

    Args:
        hub: name on the Hub, used where `data.path` is not set.
        image_column: column of the images.
        label_column: column of the labels, or a list of them (multilabel, regression).
        id_column: column of the names of rows; None: file name and row number.
        split_column: column that says train, val or test.
        split_names: `{split: name in the data set}` where the usual names do not fit.
        cache_dir: where downloads go.
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
    ) -> None:
        self.hub, self.image_column = hub, image_column
        self.label_columns = [label_column] if isinstance(label_column, str) else list(label_column)
        self.id_column, self.split_column, self.split_names = id_column, split_column, split_names
        self.cache_dir = cache_dir

    def prepare(self, path: str | None, task: str | None) -> None:
        """Downloads from the Hub unless there is a local copy."""
        if path is None and self.hub is not None:
            hub_splits(self.hub, task, self.cache_dir)

    def load(self, path: str | None, task: str | None) -> Records:
        """All rows.

        Raises:
            ValueError: see `Source.load`.
        """
        rows, names = load_rows(
            hub=self.hub,
            path=path,
            task=task,
            columns=[self.image_column, *self.label_columns, *([self.id_column] if self.id_column else [])],
            split_column=self.split_column,
            split_names=self.split_names,
            cache_dir=self.cache_dir,
        )
        root = None if path is None else Path(path).expanduser()
        return image_table_records(rows, self.image_column, self.label_columns, self.id_column, names, root)

    def read(self, path: str) -> Records:
        """Images to predict: files, npz or a table."""
        return read_images(path, self.image_column, self.label_columns, self.id_column)
