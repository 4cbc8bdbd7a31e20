"""Several networks as one: the mean of their predictions, and its metrics beside those of each alone.

    python train.py -m experiment=ecoli_sigma70 data.path=FOLDER seed=0,1,2,3,4 data.seed=0 data.fold=0,1
    python -m bimamba.ensemble logs/ecoli_sigma70/multiruns/2026-01-31_12-00-00

Reads the `predictions.parquet` of finished tests or predictions. Those of the same rows are averaged (probabilities;
of a regression, values: Lakshminarayanan et al. 2017, arXiv:1612.01474), whatever networks they come from; runs of
other rows, such as those of another fold, make another ensemble. `data.seed` decides the rows of a test that the data
do not name: leave it as it is where `seed` changes. Writes `predictions.parquet` of all rows, and, where labels are
known, `metrics.json` and `table.md`. Metrics have a test's names; they are exact, and calibration counts 15 bins,
whatever `task.thresholds` and `task.calibration_bins` the runs had.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bimamba.files import beneath, write_json, write_whole
from bimamba.predictions import FILE, Predictions, is_mean, read_predictions, write_predictions
from bimamba.tasks.metrics import make_metrics, metric_inputs


class Ensemble(NamedTuple):
    """The mean of several runs' predictions of the same rows; metrics of each run and of the mean, where labelled."""

    files: list[Path]
    mean: Predictions
    single: list[dict[str, float]]
    joint: dict[str, float]


def find_files(folders: Sequence[Path]) -> list[Path]:
    """Each folder's own table of predictions, or else those beneath it, but not beneath one that has its own.

    An ensemble's table hides none: the runs that it is of may lie beneath it. It is among those found, after them.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: none in or beneath one.
    """
    found: dict[Path, None] = {}
    means: dict[Path, None] = {}
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(f"expected a folder with runs, got {folder} (no such folder)")
        own: list[Path] = []
        files = [folder] if folder.is_file() else beneath(folder, FILE)
        for file in files:
            if any(other.parent in file.parents for other in own):
                continue
            if is_mean(file):
                means[file.resolve()] = None
            else:
                own.append(file)
        if not files:
            raise ValueError(f"{folder}: no {FILE} in it or beneath it; runs write it when they test or predict")
        found |= dict.fromkeys(file.resolve() for file in own)
    return [*found, *means]


def ensembles(files: Sequence[Path]) -> tuple[list[Ensemble], list[str]]:
    """One for each set of rows, and remarks on what was left out: files that are ensembles themselves.

    Raises:
        ValueError: rows without ids of their own, fewer than two runs of some rows, rows that overlap without being the
            same, other labels of the same rows, or a prediction that is no number.
    """
    groups: dict[frozenset[str], list[tuple[Path, Predictions]]] = {}
    first: dict[str, Path] = {}  # of each row
    others = []
    for file in files:
        found = read_predictions(file)
        if found.members > 1:
            others.append(str(file))
            continue
        ids = frozenset(found.ids)
        if len(ids) < len(found.ids):
            name = Counter(found.ids).most_common(1)[0][0]
            raise ValueError(f"{file}: several rows are called {name!r}, so that rows of two runs cannot be matched")
        if not np.isfinite(found.probabilities).all():
            raise ValueError(f"{file}: expected numbers as predictions, got NaN or infinity; leave this run out")
        if ids not in groups and (met := first.keys() & ids):
            other = first[min(met)]
            common = sum(first[row] == other for row in met)
            raise ValueError(
                f"{other} and {file} have {common} rows in common, e.g. {min(met)!r}, but not all; give "
                "runs of the same test rows (with data.seed=0 beside seed=0,1,2 they are)"
            )
        groups.setdefault(ids, []).append((file, found))
        first |= dict.fromkeys(ids - first.keys(), file)
    for group in groups.values():
        if len(group) < 2:
            raise ValueError(
                f"{group[0][0]}: no other run has predictions of its rows; an ensemble needs at least two runs of the "
                "same test rows (with data.seed=0 beside seed=0,1,2 they are)"
            )
    if not groups:
        raise ValueError(f"expected runs, got {', '.join(others)}, which is the mean of several already")
    return [_ensemble(group) for group in groups.values()], others


def _ensemble(group: Sequence[tuple[Path, Predictions]]) -> Ensemble:
    file, first = group[0]
    tables = []
    for other, found in group:
        for what in ("problem", "class_names"):
            if getattr(found, what) != getattr(first, what):
                a, b = getattr(first, what), getattr(found, what)
                raise ValueError(f"{what}: {file} has {a}, {other} has {b}")
        tables.append(found.in_order(first.ids))
        one, another = first.labels, tables[-1].labels
        same = one is another if one is None or another is None else np.array_equal(one, another)
        if not same:
            raise ValueError(f"{file} and {other} give the same rows different labels")
    mean = np.stack([t.probabilities for t in tables]).mean(0, dtype=np.float64).astype(np.float32)
    joint = first._replace(probabilities=mean, members=len(tables))
    return Ensemble([f for f, _ in group], joint, [metrics_of(t) for t in tables], metrics_of(joint))


def metrics_of(predictions: Predictions) -> dict[str, float]:
    """The metrics of a test (`metrics.make_metrics`) from a table of predictions; none without labels."""
    if predictions.labels is None:
        return {}
    metrics = make_metrics(predictions.spec, "test/")
    probabilities, labels = torch.from_numpy(predictions.probabilities), torch.from_numpy(predictions.labels)
    metrics.update(*metric_inputs(predictions.problem, probabilities, labels))
    return {name: float(value.float().mean()) for name, value in metrics.compute().items()}


def markdown(found: Sequence[Ensemble]) -> str:
    """A row a metric: one run alone, and the ensemble; ± is the sample standard deviation over runs, over ensembles."""
    runs = [metrics for e in found for metrics in e.single]
    sizes = sorted({len(e.files) for e in found})
    size = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    lines = [f"| metric | one run (n = {len(runs)}) | mean of {size} runs (n = {len(found)}) |", "|---|---|---|"]
    for name in found[0].joint:
        alone, joint = ([m[name] for m in values] for values in (runs, [e.joint for e in found]))
        lines.append(f"| {name} | {_number(alone)} | {_number(joint)} |")
    return "\n".join(lines) + "\n"


def _number(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def _joined(tables: Sequence[Predictions]) -> Predictions:
    first = tables[0]
    if any(
        (t.problem, t.class_names, t.labels is None) != (first.problem, first.class_names, first.labels is None)
        for t in tables
    ):
        raise ValueError("expected one problem with the same classes everywhere, and labels everywhere or nowhere")
    return first._replace(
        ids=[i for t in tables for i in t.ids],
        probabilities=np.concatenate([t.probabilities for t in tables]),
        labels=None if first.labels is None else np.concatenate([t.labels for t in tables]),
    )


def expect_room(folder: Path) -> None:
    """Raises a ValueError where the results would take the place of a run's."""
    there = [name for name in (FILE, "metrics.json") if (folder / name).exists()]
    if there and (FILE not in there or read_predictions(folder / FILE).members == 1):
        raise ValueError(
            f"--out: expected a new folder, or an earlier ensemble's, got {folder}, which holds {there[0]}"
        )


def write(folder: Path, found: Sequence[Ensemble]) -> None:
    """The mean's table of predictions; with labels also its metrics (means over ensembles) and the table of both."""
    write_predictions(folder / FILE, _joined([e.mean for e in found]).table())
    for name in ("metrics.json", "table.md"):  # of an earlier ensemble with labels
        (folder / name).unlink(missing_ok=True)
    if found[0].joint:
        mean = {name: float(np.mean([e.joint[name] for e in found])) for name in found[0].joint}
        write_json(folder / "metrics.json", mean)
        write_whole(folder / "table.md", markdown(found))


def main(arguments: Sequence[str] | None = None) -> list[Ensemble]:
    """The command.

    Raises:
        SystemExit: what was given makes no ensemble; one message.
    """
    parser = argparse.ArgumentParser(prog="python -m bimamba.ensemble", description="Mean predictions; see the module.")
    parser.add_argument("folders", nargs="+", type=Path, help=f"folders that hold runs, at any depth, or {FILE} files")
    parser.add_argument("--out", type=Path, help="folder of the results; default: ensemble/ in the first one")
    given = parser.parse_args(arguments)
    try:
        first = given.folders[0]
        out = given.out or (first.parent if first.is_file() else first) / "ensemble"
        expect_room(out)
        found, others = ensembles(find_files(given.folders))
        write(out, found)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if found[0].joint:
        print(markdown(found))
    for file in others:
        print(f"note: left out, an ensemble itself: {file}")
    print(f"{sum(len(e.files) for e in found)} runs, {sum(len(e.mean.ids) for e in found)} rows. Written to {out}")
    return found


if __name__ == "__main__":
    main()
