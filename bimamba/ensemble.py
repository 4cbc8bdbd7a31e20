"""Several networks as one: the mean of their predictions, and its metrics beside those of each alone.

    python train.py -m experiment=ecoli_sigma70 data.path=FOLDER seed=0,1,2,3,4 data.seed=0 data.fold=0,1
    python -m bimamba.ensemble logs/ecoli_sigma70/multiruns/2026-01-31_12-00-00

Reads the `predictions.parquet` of finished tests or predictions. Those of the same rows are averaged (probabilities;
of a regression, values: Lakshminarayanan et al. 2017, arXiv:1612.01474), whatever networks they come from; runs of
other rows, such as those of another fold, make another ensemble. Writes `predictions.parquet` of all rows, and, where
labels are known, `metrics.json` and `table.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bimamba.files import write_whole
from bimamba.predictions import Predictions, read_predictions, write_predictions
from bimamba.tasks.metrics import make_metrics

FILE = "predictions.parquet"


class Ensemble(NamedTuple):
    """The mean of several runs' predictions of the same rows; metrics of each run and of the mean, where labelled."""

    files: list[Path]
    mean: Predictions
    single: list[dict[str, float]]
    joint: dict[str, float]


def find_files(folders: Sequence[Path], out: Path) -> list[Path]:
    """Each folder's own table of predictions, or else those beneath it, but not beneath one that has its own, nor in
    `out`, where an earlier ensemble may lie.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: none in or beneath one.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(f"expected a folder with runs, got {folder} (no such folder)")
        files = [folder] if folder.is_file() else sorted(folder.rglob(FILE), key=lambda f: (len(f.parts), f))
        own: list[Path] = []
        for file in files:
            if file.parent.resolve() != out.resolve() and not any(other.parent in file.parents for other in own):
                own.append(file)
        if not own:
            raise ValueError(f"{folder}: no {FILE} in it or beneath it; runs write it when they test or predict")
        found |= dict.fromkeys(file.resolve() for file in sorted(own))
    return list(found)


def ensembles(files: Sequence[Path]) -> list[Ensemble]:
    """One for each set of rows.

    Raises:
        ValueError: fewer than two runs of some rows, rows that overlap without being the same, or other labels of the
            same rows.
    """
    groups: dict[tuple[str, ...], list[tuple[Path, Predictions]]] = {}
    for file in files:
        found = read_predictions(file)
        groups.setdefault(tuple(found.ids), []).append((file, found))
    seen: dict[str, Path] = {}
    for ids, group in groups.items():
        file = group[0][0]
        if met := seen.keys() & set(ids):
            raise ValueError(
                f"{seen[min(met)]} and {file} have {len(met)} rows in common, e.g. {min(met)!r}, but not all, or in "
                "another order; give runs of the same test rows (data.seed says which they are)"
            )
        seen |= dict.fromkeys(ids, file)
        if len(group) < 2:
            raise ValueError(f"{file}: no other run has predictions of its rows; an ensemble needs at least two")
    return [_ensemble(group) for group in groups.values()]


def _ensemble(group: Sequence[tuple[Path, Predictions]]) -> Ensemble:
    file, first = group[0]
    for other, found in group[1:]:
        for what in ("problem", "class_names"):
            if getattr(found, what) != getattr(first, what):
                a, b = getattr(first, what), getattr(found, what)
                raise ValueError(f"{what}: {file} has {a}, {other} has {b}")
        same = first.labels is None or found.labels is None or np.array_equal(first.labels, found.labels)
        if not same or (first.labels is None) != (found.labels is None):
            raise ValueError(f"{file} and {other} give the same rows different labels")
    tables = [found for _, found in group]
    mean = first._replace(
        probabilities=np.stack([t.probabilities for t in tables]).mean(0, dtype=np.float64).astype("f4")
    )
    return Ensemble([f for f, _ in group], mean, [metrics_of(t) for t in tables], metrics_of(mean))


def metrics_of(predictions: Predictions) -> dict[str, float]:
    """The metrics of a test (`metrics.make_metrics`) from a table of predictions; none without labels."""
    if predictions.labels is None:
        return {}
    metrics = make_metrics(predictions.spec, "test/")
    probabilities, labels = torch.from_numpy(predictions.probabilities), torch.from_numpy(predictions.labels)
    if predictions.problem == "regression" and probabilities.shape[1] == 1:
        probabilities, labels = probabilities[:, 0], labels[:, 0]
    metrics.update(probabilities, labels)
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


def write(folder: Path, found: Sequence[Ensemble]) -> None:
    """The mean's table of predictions; with labels also its metrics (means over ensembles) and the table of both."""
    write_predictions(folder / FILE, _joined([e.mean for e in found]).table())
    if found[0].joint:
        mean = {name: float(np.mean([e.joint[name] for e in found])) for name in found[0].joint}
        write_whole(folder / "metrics.json", json.dumps(mean, indent=2, sort_keys=True) + "\n")
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
        found = ensembles(find_files(given.folders, out))
        write(out, found)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if found[0].joint:
        print(markdown(found))
    print(f"{sum(len(e.files) for e in found)} runs, {sum(len(e.mean.ids) for e in found)} rows. Written to {out}")
    return found


if __name__ == "__main__":
    main()
