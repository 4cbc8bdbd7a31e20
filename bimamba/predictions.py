"""From probabilities to decisions, and the table that is written of them and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bimamba.spec import DataSpec

PROBLEM = "bimamba.problem"  # key of a table's metadata


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
        and labels are lists of names. Regression: `prediction_<target>` and `label_<target>`.
    """
    columns: dict[str, Any] = {"id": pa.array(ids, pa.string())}
    names = spec.class_names
    if spec.problem == "regression":
        for i, name in enumerate(names):
            columns[f"prediction_{name}"] = pa.array(probabilities[:, i], pa.float32())
            if labels is not None:
                columns[f"label_{name}"] = pa.array(labels[:, i], pa.float32())
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
    chosen = [[n for n, v in zip(names, row, strict=True) if v > 0.5] for row in rows]
    return pa.array(chosen, pa.list_(pa.string()))


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

    @property
    def spec(self) -> DataSpec:
        """Problem and names; what the inputs were a table does not say."""
        return DataSpec("sequence", self.problem, self.class_names, alphabet="N", max_length=1)

    def table(self) -> pa.Table:
        return prediction_table(self.spec, self.ids, self.probabilities, self.labels)


def read_predictions(path: Path) -> Predictions:
    """The inverse of `write_predictions` and `prediction_table`.

    Raises:
        ValueError: the file is damaged, or no table of predictions that says its problem.
    """
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: expected a table of predictions as Parquet, got {error}") from error
    problem = (table.schema.metadata or {}).get(PROBLEM.encode(), b"").decode()
    if not problem:
        raise ValueError(
            f"{path}: its metadata have no {PROBLEM!r}; another program or an earlier version wrote it: test "
            "or predict again"
        )
    prefix = "prediction_" if problem == "regression" else "probability_"
    names = tuple(c.removeprefix(prefix) for c in table.column_names if c.startswith(prefix))
    values = np.stack([table[prefix + name].to_numpy() for name in names], axis=1)
    labels = None
    if problem == "regression":
        if f"label_{names[0]}" in table.column_names:
            labels = np.stack([table[f"label_{name}"].to_numpy() for name in names], axis=1)
    elif "label" in table.column_names:
        place = {name: i for i, name in enumerate(names)}
        if problem == "multilabel":
            labels = np.array([[name in row for name in names] for row in table["label"].to_pylist()], dtype=np.int64)
        else:
            labels = np.array([place[name] for name in table["label"].to_pylist()], dtype=np.int64)
    return Predictions(problem, names, table["id"].to_pylist(), values[:, 1] if problem == "binary" else values, labels)
