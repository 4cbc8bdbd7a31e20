"""From probabilities to decisions, and the table that is written of them and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bimamba.spec import DataSpec

FILE = "predictions.parquet"  # of a test or prediction, in its folder
# Keys of a table's metadata
PROBLEM = "bimamba.problem"
MEMBERS = "bimamba.members"  # of an ensemble: of how many runs it is the mean
UNNAMED = ("0",)  # names of one target of a regression that nobody has named


class Decision(NamedTuple):
    """A prediction as text, and the probability it was made with (regression: empty)."""

    text: str
    score: str


def class_probabilities(spec: DataSpec, probabilities: np.ndarray) -> np.ndarray:
    """`(n, classes)`: binary probabilities `(n)` of the positive class get their negative column."""
    if spec.problem == "binary":
        positive = probabilities.reshape(len(probabilities))
        return np.stack([1 - positive, positive], axis=1)
    return probabilities


def predicted_class(spec: DataSpec, probabilities: np.ndarray) -> np.ndarray:
    """`(n)` class numbers of a multiclass or binary problem; a binary 0.5 is negative, as in the metrics."""
    if spec.problem == "binary":
        return (probabilities.reshape(len(probabilities)) > 0.5).astype(np.int64)
    return probabilities.argmax(-1)


def decide(spec: DataSpec, probabilities: np.ndarray) -> list[Decision]:
    """What each row of `losses.probabilities` stands for."""
    if spec.problem == "regression":
        return [Decision(", ".join(f"{v:.4g}" for v in row), "") for row in probabilities]
    if spec.problem == "multilabel":
        names = spec.class_names
        chosen = [", ".join(n for n, v in zip(names, row, strict=True) if v > 0.5) for row in probabilities]
        return [Decision(c or "none", f"{row.max():.2f}") for c, row in zip(chosen, probabilities, strict=True)]
    classes, table = predicted_class(spec, probabilities), class_probabilities(spec, probabilities)
    return [Decision(spec.class_names[k], f"{row[k]:.2f}") for k, row in zip(classes, table, strict=True)]


def prediction_table(spec: DataSpec, ids: list[str], probabilities: np.ndarray, labels: np.ndarray | None) -> pa.Table:
    """A row a sample; the schema's metadata say which problem it is, for `read_predictions`.

    Args:
        spec: names and problem.
        ids: of the samples.
        probabilities: as of `losses.probabilities`.
        labels: class numbers `(n)` (multilabel and regression: `(n, k)`), or None where unknown.

    Returns:
        Columns `id`, `prediction`, `label` if known, and `probability_<class>` for each class. Multilabel: predictions
        and labels are lists of names. Regression: `prediction_<target>` and `label_<target>`; of one target without a
        name `prediction` and `label`.
    """
    columns: dict[str, Any] = {"id": pa.array(ids, pa.string())}
    names = spec.class_names
    if spec.problem == "regression":
        for i, target in enumerate([""] if names == UNNAMED else [f"_{name}" for name in names]):
            columns[f"prediction{target}"] = pa.array(probabilities[:, i], pa.float32())
            if labels is not None:
                columns[f"label{target}"] = pa.array(labels[:, i], pa.float32())
        return pa.table(columns, metadata={PROBLEM: spec.problem})
    if spec.problem == "multilabel":
        columns["prediction"] = _listed(names, probabilities)
        if labels is not None:
            columns["label"] = _listed(names, labels)
    else:
        text = np.array(names, dtype=object)
        columns["prediction"] = pa.array(text[predicted_class(spec, probabilities)], pa.string())
        if labels is not None:
            columns["label"] = pa.array(text[labels.astype(np.int64)], pa.string())
    for name, values in zip(names, class_probabilities(spec, probabilities).T, strict=True):
        columns[f"probability_{name}"] = pa.array(values, pa.float32())
    return pa.table(columns, metadata={PROBLEM: spec.problem})


def _listed(names: tuple[str, ...], rows: np.ndarray) -> pa.Array:
    """The names that are above one half, row by row."""
    chosen = rows > 0.5
    ends = np.concatenate([[0], chosen.sum(1).cumsum()]).astype(np.int32)
    text = pa.array(np.array(names, dtype=object)[chosen.nonzero()[1]], pa.string())
    return pa.ListArray.from_arrays(pa.array(ends), text)


def _unlisted(names: tuple[str, ...], column: pa.ChunkedArray) -> np.ndarray:
    """The inverse of `_listed`, int64 `(n, k)`."""
    lists = column.combine_chunks()
    rows = np.zeros((len(lists), len(names)), np.int64)
    places = pc.index_in(lists.flatten(), pa.array(names)).to_numpy()
    rows[np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy()), places] = 1
    return rows


def write_predictions(path: Path, table: pa.Table) -> None:
    """Write the table as Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


class Predictions(NamedTuple):
    """A table of predictions as arrays: probabilities as of `losses.probabilities`, labels as in `prediction_table`."""

    problem: str
    class_names: tuple[str, ...]
    ids: list[str]
    probabilities: np.ndarray
    labels: np.ndarray | None
    members: int = 1

    @property
    def spec(self) -> DataSpec:
        """Problem and names; what the inputs were a table does not say."""
        return DataSpec("sequence", self.problem, self.class_names, alphabet="N", max_length=1)

    def in_order(self, ids: list[str]) -> Predictions:
        """The same rows in the order of these ids, which are theirs, each once."""
        if ids == self.ids:
            return self
        place = {name: i for i, name in enumerate(self.ids)}
        rows = np.array([place[name] for name in ids])
        labels = None if self.labels is None else self.labels[rows]
        return self._replace(ids=ids, probabilities=self.probabilities[rows], labels=labels)

    def table(self) -> pa.Table:
        table = prediction_table(self.spec, self.ids, self.probabilities, self.labels)
        if self.members == 1:
            return table
        return table.replace_schema_metadata({**table.schema.metadata, MEMBERS: str(self.members)})


def read_predictions(path: Path) -> Predictions:
    """The inverse of `write_predictions` and `prediction_table`.

    Raises:
        ValueError: the file is damaged, no table of predictions that says its problem, or without rows.
    """
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: expected a table of predictions as Parquet, got {error}") from error
    notes = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    problem = notes.get(PROBLEM)
    if not problem:
        raise ValueError(
            f"{path}: its metadata have no {PROBLEM!r}; another program or an earlier version wrote it: test "
            "or predict again"
        )
    if not len(table):
        raise ValueError(f"{path}: expected predictions, got a table without rows")
    if problem == "regression" and "prediction" in table.column_names:
        number = {"prediction": f"prediction_{UNNAMED[0]}", "label": f"label_{UNNAMED[0]}"}  # as earlier versions wrote
        table = table.rename_columns([number.get(c, c) for c in table.column_names])
    prefix = "prediction_" if problem == "regression" else "probability_"
    names = tuple(c.removeprefix(prefix) for c in table.column_names if c.startswith(prefix))
    values = np.stack([table[prefix + name].to_numpy() for name in names], axis=1)
    labels = None
    if problem == "regression":
        if f"label_{names[0]}" in table.column_names:
            labels = np.stack([table[f"label_{name}"].to_numpy() for name in names], axis=1)
    elif "label" in table.column_names:
        labels = _unlisted(names, table["label"]) if problem == "multilabel" else _numbers(names, table["label"])
    probabilities = values[:, 1] if problem == "binary" else values
    return Predictions(problem, names, table["id"].to_pylist(), probabilities, labels, int(notes.get(MEMBERS, "1")))


def is_mean(path: Path) -> bool:
    """Whether a table is an ensemble's, by its metadata alone; of a file that is no table: no."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return False
    return MEMBERS.encode() in metadata


def _numbers(names: tuple[str, ...], column: pa.ChunkedArray) -> np.ndarray:
    """Class numbers of class names, int64 `(n)`."""
    return pc.index_in(column.combine_chunks(), pa.array(names)).to_numpy().astype(np.int64)
