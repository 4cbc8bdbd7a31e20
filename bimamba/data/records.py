"""What a source hands to a DataModule: every row it found, not yet tokenised, decoded or split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

UNSPLIT = "all"
SPLITS = ("train", "val", "test")
# How the three splits are called in the wild; file names, folder names and split columns are read through this.
SPLIT_ALIASES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass
class Records:
    """All rows of a data set, whichever split they belong to.

    Args:
        inputs: images (`bimamba.data.images.PixelArray` or `EncodedImages`) or sequences
            (`bimamba.data.sequences.ByteRows`).
        ids: a name for each row that means something to a person.
        splits: row numbers of each split the source itself defines (`train`, `val`, `test`), or of `all` where it
            defines none.
        describe: `row -> "file: row 17"`, for messages.
        labels: one of int64 `(n,)` (class numbers), str objects `(n,)` (class names), float64 `(n,)` (a regression
            target) or float64 `(n, k)` (several label columns); None where nothing is known.
        groups: int64 `(n,)`: rows that belong together (of one patient, one gene family) and come into one split where
            splits are made; None: unknown.
        label_names: names of the class numbers (index = number), or of the k label columns. None: unknown.
        notes: what the source did that the user should know; the preflight prints them.
    """

    inputs: Any
    ids: Sequence[str]
    splits: dict[str, np.ndarray]
    describe: Callable[[int], str]
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None
    label_names: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.inputs):
            raise AssertionError(f"{len(self.inputs)} inputs, {len(self.ids)} ids")

    def __len__(self) -> int:
        return len(self.inputs)


class Origins:
    """Where row i of several files' rows comes from: called with i, it answers `file: row n`, n from 1.

    Args:
        files: `(name, number of rows)`, in the order of the rows.
        unit: what a row is called.
        kept: original number (from 0) of each row, where some were left out.
    """

    def __init__(self, files: Sequence[tuple[str, int]], unit: str = "row", kept: np.ndarray | None = None) -> None:
        self.files, self.unit, self.kept = list(files), unit, kept
        self.bounds = np.cumsum([0, *(count for _, count in files)])

    def locate(self, row: int) -> tuple[str, int]:
        """File name, and number from 1."""
        if self.kept is not None:
            row = int(self.kept[row])
        file = int(np.searchsorted(self.bounds, row, side="right")) - 1
        return self.files[file][0], row - int(self.bounds[file]) + 1

    def __call__(self, row: int) -> str:
        name, number = self.locate(row)
        return f"{name}: {self.unit} {number}"

    def ids(self) -> list[str]:
        """`stem:n` for every row."""
        stems = [Path(name).name.split(".")[0] for name, _ in self.files]
        found = [f"{stem}:{n}" for stem, (_, count) in zip(stems, self.files, strict=True) for n in range(1, count + 1)]
        return found if self.kept is None else [found[i] for i in self.kept.tolist()]


def group_numbers(values: Sequence[Any], column: int | str, describe: Callable[[int], str]) -> np.ndarray:
    """`Records.groups` from the values of a column.

    Raises:
        ValueError: a row without a value.
    """
    names = ["" if value is None else str(value) for value in values]
    missing = [row for row, name in enumerate(names) if not name]
    if missing:
        raise ValueError(
            f"{describe(missing[0])}: expected a value in column {column!r} (data.source.group_column), got none "
            f"({len(missing)} such rows)"
        )
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


class Names:
    """Where row i comes from, for rows that are files of their own. A class, since loader processes may pickle it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def __call__(self, row: int) -> str:
        return self.names[row]


class Source(Protocol):
    """Where rows come from. `path` and `task` are the DataModule's own options, handed on."""

    def prepare(self, path: str | None, task: str | None) -> None:
        """Downloads what is missing. Called on one process a node."""

    def load(self, path: str | None, task: str | None) -> Records:
        """Reads every row.

        Raises:
            ValueError: no file, a wrong column, an unreadable row.
        """

    def read(self, path: str) -> Records:
        """Reads the rows of a file or folder to predict; labels only where they are known."""


def existing(path: str | Path, what: str) -> Path:
    """`path`, expanded.

    Raises:
        ValueError: nothing is there.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise ValueError(f"{what}: expected a file or folder, nothing is at {found.absolute()}")
    return found


def required_path(path: str | None, what: str) -> Path:
    """Like `existing`, for sources that cannot do without `data.path`.

    Raises:
        ValueError: no path was given, or nothing is there.
    """
    if path is None:
        raise ValueError(f"data.path is not set: expected {what}")
    return existing(path, "data.path")
