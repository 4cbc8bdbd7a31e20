"""From whatever a file calls a label to the numbers a loss needs, and the names that go with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from bimamba.data.records import Records
from bimamba.data.tables import Rows

MANY_CLASSES = 20  # from here on, values that hardly repeat look like names or measurements rather than classes
PROBLEMS = ("multiclass", "binary", "multilabel", "regression")


def read_labels(rows: Rows, columns: Sequence[str]) -> np.ndarray:
    """Label columns of a table, in one of the forms of `Records.labels`.

    Raises:
        ValueError: a missing value, NaN, or a type that cannot be a label.
    """
    parsed = [_read_column(rows, c) for c in columns]
    if len(columns) == 1:
        return parsed[0]
    for name, values in zip(columns, parsed, strict=True):
        if values.dtype == object:
            raise ValueError(f"label column {name!r}: several label columns have to hold numbers, got text")
    return np.stack([v.astype(np.float64) for v in parsed], axis=1)


def _read_column(rows: Rows, name: str) -> np.ndarray:
    column = rows.table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if column.null_count:
        row = next(i for i, valid in enumerate(column.is_valid().to_pylist()) if not valid)
        raise ValueError(f"{rows.describe(row)}: label column {name!r}: expected a label, got a missing value")
    if pa.types.is_boolean(kind):
        return np.asarray(column.cast(pa.int8()).to_numpy(), np.int64)
    if pa.types.is_integer(kind):
        return np.asarray(column.to_numpy(), np.int64)
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = np.asarray(pc.cast(column, pa.float64()).to_numpy())
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(
                f"{rows.describe(int(bad[0]))}: label column {name!r}: expected a number, got {values[bad[0]]}"
            )
        return values
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = np.array([v.strip() for v in column.to_pylist()], dtype=object)
        empty = np.flatnonzero(values == "")
        if len(empty):
            raise ValueError(f"{rows.describe(int(empty[0]))}: label column {name!r}: expected a label, got ''")
        return values
    raise ValueError(f"label column {name!r}: expected numbers or text, got type {kind}")


@dataclass(frozen=True)
class LabelMap:
    """Meaning of the labels: the problem and the names, in the order of the outputs."""

    problem: str
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, records: Records, problem: str | None, declared: Sequence[str] | None) -> LabelMap:
        """Reads problem and names off the labels where the configuration leaves them open.

        Names: `data.class_names`, else those the source knows (index = class number), else the sorted values met.
        Problem: two classes are binary, more multiclass; several label columns of 0 and 1 multilabel.

        Raises:
            ValueError: no labels, one class only, or labels that do not fit the problem.
        """
        if problem is not None and problem not in PROBLEMS:
            raise ValueError(f"data.problem: expected one of {', '.join(PROBLEMS)}, or null, got {problem!r}")
        labels = records.labels
        if labels is None or len(labels) == 0:
            raise ValueError("the data set has no labelled rows")
        names = tuple(declared) if declared is not None else records.label_names
        if names is not None and len(set(names)) != len(names):
            raise ValueError(f"data.class_names: expected different names, got {list(names)}")
        if labels.ndim == 2 or problem in ("multilabel", "regression"):
            return cls(*cls._of_columns(labels, problem, names))
        if labels.dtype == np.float64:
            labels = whole_numbers(records, labels)
        if names is None:
            if labels.dtype != object and labels.min() < 0:
                row = int(np.argmin(labels))
                raise ValueError(f"{records.describe(row)}: expected class numbers from 0, got {labels[row]}")
            if problem is None:
                _check_repeats(labels)
            names = tuple(str(v) for v in sorted(set(labels.tolist())))
        if len(names) < 2:
            raise ValueError(
                f"expected at least two classes, got one: {names[0]!r}" if names else "no class has a name"
            )
        if problem == "binary" and len(names) != 2:
            raise ValueError(f"data.problem=binary: expected two classes, got {len(names)}: {list(names)}")
        return cls(problem or ("binary" if len(names) == 2 else "multiclass"), names)

    @staticmethod
    def _of_columns(
        labels: np.ndarray, problem: str | None, names: tuple[str, ...] | None
    ) -> tuple[str, tuple[str, ...]]:
        if labels.dtype == object:
            raise ValueError(f"data.problem={problem}: expected labels as numbers, got text such as {labels[0]!r}")
        width = labels.shape[1] if labels.ndim == 2 else 1
        binary = bool(np.isin(labels, (0, 1)).all())
        if problem is None and not binary:
            raise ValueError(
                f"{width} label columns with values other than 0 and 1: expected data.problem=regression, got null"
            )
        if problem in ("multiclass", "binary"):
            raise ValueError(f"data.problem={problem}: expected one label column, got {width}")
        if problem == "multilabel" and not binary:
            value = labels[~np.isin(labels, (0, 1))].flat[0]
            raise ValueError(f"data.problem=multilabel: expected labels 0 and 1, got {value:g}")
        if names is None:
            names = tuple(str(i) for i in range(width))
        if len(names) != width:
            raise ValueError(f"data.class_names: expected {width} names (one a label column), got {len(names)}")
        return problem or "multilabel", names

    def encode(self, records: Records) -> torch.Tensor:
        """int64 `(n,)` for classes, float32 `(n, k)` for multilabel and regression.

        Raises:
            ValueError: a label outside the map, its row named.
        """
        labels = records.labels
        assert labels is not None
        k = len(self.class_names)
        if self.problem in ("multilabel", "regression"):
            if labels.dtype == object:
                raise ValueError(f"expected {self.problem} labels as numbers, got text such as {labels[0]!r}")
            values = labels.reshape(len(labels), -1).astype(np.float64)
            if values.shape[1] != k:
                raise ValueError(f"expected {k} label columns {list(self.class_names)}, got {values.shape[1]}")
            known = records.label_names
            if known is not None and known != self.class_names and set(known) == set(self.class_names):
                values = values[:, [known.index(name) for name in self.class_names]]
            allowed = np.isfinite(values) if self.problem == "regression" else np.isin(values, (0, 1))
            if not allowed.all():
                row, column = np.argwhere(~allowed)[0]
                raise ValueError(
                    f"{records.describe(int(row))}: label {self.class_names[column]!r}: expected "
                    f"{'a number' if self.problem == 'regression' else '0 or 1'}, got {values[row, column]:g}"
                )
            return torch.from_numpy(values).float()
        if labels.ndim == 2:
            raise ValueError(f"expected one label column ({self.problem}), got {labels.shape[1]}")
        if labels.dtype == np.float64:
            labels = whole_numbers(records, labels)
        # Class numbers stand for positions only where the source or the configuration named them; bare numbers and
        # text are matched by name, so that a checkpoint's classes "1", "2" stay what they were.
        if labels.dtype != object and records.label_names is None and all(_is_int(n) for n in self.class_names):
            labels = np.array([str(v) for v in labels.tolist()], dtype=object)
        if labels.dtype == object:
            number = {name: i for i, name in enumerate(self.class_names)}
            codes = np.array([number.get(v, -1) for v in labels.tolist()], np.int64)
        else:
            if records.label_names is not None and records.label_names != self.class_names:
                index = {name: i for i, name in enumerate(self.class_names)}
                names = [index.get(n, -1) for n in records.label_names]
                inside = (labels >= 0) & (labels < len(names))
                codes = np.where(inside, np.array(names, np.int64)[np.where(inside, labels, 0)], -1)
            else:
                codes = np.where((labels >= 0) & (labels < k), labels, -1)
        bad = np.flatnonzero(codes < 0)
        if len(bad):
            row = int(bad[0])
            got = labels[row : row + 1].tolist()[0]
            raise ValueError(
                f"{records.describe(row)}: expected a label of {_listed(self.class_names)}"
                f"{'' if labels.dtype == object else f' (numbers 0 to {k - 1})'}, got {got!r} "
                f"({len(bad)} such rows)"
            )
        return torch.from_numpy(codes.astype(np.int64))


def _check_repeats(labels: np.ndarray) -> None:
    """Raises ValueError for what is no class: of more than 20 values, most are met in one row only."""
    counts = Counter(labels.tolist())
    single = [value for value, n in counts.items() if n == 1]
    if len(counts) > MANY_CLASSES and len(single) > len(counts) / 2:
        raise ValueError(
            f"the labels: expected classes of several rows each, got {len(counts)} values of which {len(single)} have "
            f"one row ({', '.join(map(repr, single[:5]))}, …): a column of names or numbers? set "
            "data.source.label_column to the column of the classes, or data.problem=regression for numbers "
            "(data.problem=multiclass: these are the classes)"
        )


def whole_numbers(records: Records, labels: np.ndarray) -> np.ndarray:
    """Float labels as class numbers.

    Raises:
        ValueError: a label is no whole number.
    """
    bad = np.flatnonzero(labels != np.round(labels))
    if len(bad):
        raise ValueError(
            f"{records.describe(int(bad[0]))}: expected a class, got the number {labels[bad[0]]:g}; "
            "for numbers to predict set data.problem=regression"
        )
    return labels.astype(np.int64)


def _is_int(name: str) -> bool:
    return name.removeprefix("-").isdigit()


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:12]))
    return shown if len(names) <= 12 else f"{shown}, … ({len(names)} classes)"
