"""What the data look like, said before any training; and the errors for data on which training cannot work."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from bimamba.data.images import CachedImages
from bimamba.data.records import SPLITS
from bimamba.data.sequences import TokenRows
from bimamba.strands import complement_tokens, is_dna

if TYPE_CHECKING:
    from bimamba.data.datamodule import ClassificationDataModule

IMBALANCE = 10.0  # the largest class has this many times the rows of the smallest: worth a warning
CLASSES_SHOWN = 12
BINS = 8


def warn(message: str) -> None:
    """A warning, on rank zero."""
    if _on_rank_zero():
        warnings.warn(message, UserWarning, stacklevel=3)


def _on_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def class_counts(data: ClassificationDataModule, split: str) -> torch.Tensor:
    """Rows of each class in a split, int64 `(k,)`; for multilabel, rows that carry the label."""
    assert data.examples is not None and data.examples.labels is not None
    if data.spec.problem == "regression":
        raise ValueError("a regression problem has no classes to count")
    labels = data.examples.labels[torch.from_numpy(data.splits[split])]
    if labels.ndim == 2:
        return labels.sum(0).long()
    return torch.bincount(labels, minlength=len(data.spec.class_names))


def check_classes(data: ClassificationDataModule, describe: Callable[[int], str]) -> None:
    """Raises ValueError if a class has no training rows, naming with `describe` a row elsewhere that has the class."""
    if data.spec.problem not in ("multiclass", "binary"):
        return
    counts = class_counts(data, "train").tolist()
    empty = [number for number, n in enumerate(counts) if n == 0]
    if empty:
        assert data.examples is not None and data.examples.labels is not None
        name, rows = data.spec.class_names[empty[0]], np.flatnonzero(data.examples.labels.numpy() == empty[0])
        elsewhere = ""
        if len(rows):
            met = " and ".join(s for s in SPLITS if np.isin(rows, data.splits[s]).any())
            elsewhere = f"; {name!r} is met in {met} alone: {describe(int(rows[0]))}"
        raise ValueError(
            f"expected training rows of every class, got none of "
            f"{', '.join(repr(data.spec.class_names[i]) for i in empty)} "
            f"(classes: {', '.join(map(repr, data.spec.class_names[:CLASSES_SHOWN]))}){elsewhere}"
        )


def report(data: ClassificationDataModule) -> dict[str, Any]:
    """Measures, checks and prints.

    Returns:
        Plain numbers, strings, lists and dicts: `sizes`, `class_counts` or `targets`, `lengths` or `image`,
        `unknown`, `duplicates`, `notes`, `warnings`.

    Raises:
        ValueError: training on these data cannot work.
    """
    if data.examples is None:
        raise RuntimeError("call setup('fit') or setup('test') first")
    spec, store = data.spec, data.examples.inputs
    found: dict[str, Any] = {
        "kind": spec.kind,
        "problem": spec.problem,
        "class_names": list(spec.class_names),
        "sizes": data.sizes,
        "notes": list(data.notes),
        "warnings": [],
    }
    splits = {name: data.splits[name] for name in SPLITS if len(data.splits[name])}
    if spec.problem == "regression":
        found["targets"] = _targets(data, splits)
    else:
        found["class_counts"] = {
            name: dict(zip(spec.class_names, class_counts(data, name).tolist(), strict=True)) for name in splits
        }
        found["warnings"] += _balance(found["class_counts"], spec.problem)
    if isinstance(store, TokenRows):
        found["lengths"] = _lengths(store, splits)
        found["unknown"] = _unknown(store, spec.letters)
        if store.truncated:
            found["notes"].append(f"{store.truncated} sequences cut to {spec.max_length} letters (data.truncate)")
    else:
        found["image"] = {key: getattr(spec, key) for key in ("channels", "height", "width")}
        found["image"].update(mean=list(spec.mean or ()), std=list(spec.std or ()))
        found["image"]["in_memory"] = isinstance(store, CachedImages)
        found["warnings"] += store.losses.sentences()
    found["duplicates"] = _duplicates(data, splits)
    found["warnings"] += _duplicate_warnings(found["duplicates"])
    for name in SPLITS:
        if name not in splits:
            found["notes"].append(f"no {name} set")
    if _on_rank_zero():
        show(found)
    return found


def _targets(data: ClassificationDataModule, splits: dict[str, np.ndarray]) -> dict[str, Any]:
    assert data.examples is not None and data.examples.labels is not None
    values = data.examples.labels.numpy()
    found: dict[str, Any] = {}
    for column, name in enumerate(data.spec.class_names):
        found[name] = {
            split: {key: round(float(f(values[rows, column])), 6) for key, f in _STATISTICS.items()}
            for split, rows in splits.items()
        }
        if "train" in splits and found[name]["train"]["std"] == 0:
            raise ValueError(f"target {name!r}: expected values that differ, got {values[0, column]:g} in every row")
    return found


_STATISTICS: dict[str, Callable[[np.ndarray], Any]] = {"min": np.min, "mean": np.mean, "std": np.std, "max": np.max}


def _balance(counts: dict[str, dict[str, int]], problem: str) -> list[str]:
    said = []
    if "train" in counts:
        sizes = counts["train"]
        least, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        if problem == "multilabel":
            said += [f"no training row carries the label {name!r}" for name, n in sizes.items() if n == 0]
        elif sizes[most] > IMBALANCE * sizes[least]:
            said.append(
                f"imbalanced classes: {sizes[most]} training rows of {most!r}, {sizes[least]} of {least!r}; "
                "consider class weights, and read balanced accuracy or MCC rather than accuracy"
            )
    for split in ("val", "test"):
        absent = [name for name, n in counts.get(split, {}).items() if n == 0]
        if absent and problem != "multilabel":
            said.append(f"{split} has no rows of {', '.join(map(repr, absent[:CLASSES_SHOWN]))}")
    return said


def _lengths(store: TokenRows, splits: dict[str, np.ndarray]) -> dict[str, Any]:
    lengths = store.lengths.numpy()
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.linspace(low, high + 1, BINS + 1).astype(int))
    return {
        "edges": edges.tolist(),
        "histogram": {name: np.histogram(lengths[rows], edges)[0].tolist() for name, rows in splits.items()},
        "min": low,
        "median": float(np.median(lengths)),
        "max": high,
    }


def _unknown(store: TokenRows, alphabet: str) -> dict[str, Any]:
    total = sum(store.unknown.values())
    share = total / max(len(store.tokens), 1)
    if share > 0.5:
        raise ValueError(
            f"{share:.0%} of the characters are unknown to the alphabet {alphabet!r} "
            f"(most often {max(store.unknown, key=store.unknown.__getitem__)!r}): expected such sequences; "
            "is it the right column, and the right data.alphabet?"
        )
    return {"characters": dict(sorted(store.unknown.items())), "share": share, "become": alphabet[-1]}


def _duplicates(data: ClassificationDataModule, splits: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Counts of rows that occur before, or None where nobody looked."""
    assert data.examples is not None and data.examples.labels is not None
    store, labels = data.examples.inputs, data.examples.labels
    if not data.check_duplicates or not isinstance(store, (TokenRows, CachedImages)):
        return None
    keys = _row_hashes(store, data.spec.alphabet)
    first = {name: _count(values, splits) for name, values in keys.items()}
    widest = list(keys.values())[-1]
    rows = np.concatenate(list(splits.values()))
    conflicting = None
    if data.spec.problem != "regression":
        coded = torch.unique(labels, dim=0, return_inverse=True)[1].numpy() if labels.ndim == 2 else labels.numpy()
        pairs = np.unique(np.stack([widest[rows], coded[rows].astype(np.int64)]), axis=1)
        values, counts = np.unique(pairs[0], return_counts=True)
        conflicting = int(np.isin(widest[rows], values[counts > 1]).sum())
    return {**first, "conflicting_labels": conflicting}


def _row_hashes(store: TokenRows | CachedImages, alphabet: str | None) -> dict[str, np.ndarray]:
    """64-bit hash of each row's content; for DNA also one that both strands share."""
    if isinstance(store, CachedImages):
        pixels = store.pixels.numpy()
        return {"exact": np.fromiter((hash(p.tobytes()) for p in pixels), np.int64, len(pixels))}
    tokens, ends = store.tokens.numpy().tobytes(), store.offsets.tolist()
    rows = list(pairwise(ends))
    found = {"exact": np.fromiter((hash(tokens[a:b]) for a, b in rows), np.int64, len(rows))}
    if alphabet is not None and is_dna(alphabet):
        other = complement_tokens(alphabet).numpy()[store.tokens.numpy()[::-1]].tobytes()
        n = len(tokens)
        both = (hash(min(tokens[a:b], other[n - b : n - a])) for a, b in rows)
        found["either_strand"] = np.fromiter(both, np.int64, len(rows))
    return found


def _count(keys: np.ndarray, splits: dict[str, np.ndarray]) -> dict[str, dict[str, int]]:
    within = {name: len(rows) - len(np.unique(keys[rows])) for name, rows in splits.items()}
    across = {f"{a}/{b}": int(np.isin(keys[splits[b]], keys[splits[a]]).sum()) for a, b in combinations(splits, 2)}
    return {"within": within, "across": across}


def _duplicate_warnings(duplicates: dict[str, Any] | None) -> list[str]:
    if duplicates is None:
        return []
    said = []
    kind = "either_strand" if "either_strand" in duplicates else "exact"
    where = " (reverse complements included)" if kind == "either_strand" else ""
    for pair, n in duplicates[kind]["across"].items():
        if n:
            a, b = pair.split("/")
            said.append(f"{n} rows of {b} are also in {a}{where}: figures on {b} will be too good")
    if duplicates["conflicting_labels"]:
        said.append(f"{duplicates['conflicting_labels']} rows have a duplicate with another label{where}")
    return said


def show(found: dict[str, Any]) -> None:
    """Prints a report as tables."""
    console = Console(stderr=True)
    table = Table(title=f"data: {found['kind']}, {found['problem']}", title_justify="left")
    table.add_column("")
    for split in found["sizes"]:
        table.add_column(split, justify="right")
    table.add_row("rows", *map(str, found["sizes"].values()), end_section=True)
    for name, numbers in _count_rows(found):
        table.add_row(name, *numbers)
    console.print(table)
    if found["problem"] == "binary":
        console.print(f"positive class: {found['class_names'][-1]!r} (the last one; data.class_names sets the order)")
    if "lengths" in found:
        _show_lengths(console, found["lengths"])
        unknown = found["unknown"]
        if unknown["characters"]:
            shown = ", ".join(f"{c!r} {n}" for c, n in unknown["characters"].items())
            console.print(f"unknown characters: {shown} ({unknown['share']:.2%} of all; read as {unknown['become']})")
    if "image" in found:
        image = found["image"]
        numbers = [", ".join(f"{v:.4g}" for v in image[key]) for key in ("mean", "std")]
        held = "in memory" if image["in_memory"] else "decoded when needed"
        shape = f"{image['channels']}×{image['height']}×{image['width']}"
        console.print(f"images: {shape}, {held}, mean {numbers[0]}, std {numbers[1]}")
    for name, targets in found.get("targets", {}).items():
        console.print(f"target {name}: {targets}")
    _show_duplicates(console, found["duplicates"])
    for note in found["notes"]:
        console.print(f"note: {note}")
    for warning in found["warnings"]:
        console.print(f"warning: {warning}", style="yellow")


def _count_rows(found: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """One line a class; with many classes, the smallest and the largest."""
    counts, splits = found.get("class_counts"), found["sizes"]
    if counts is None:
        return []
    if len(found["class_names"]) <= CLASSES_SHOWN:
        return [(name, [str(counts[s][name]) if s in counts else "" for s in splits]) for name in found["class_names"]]
    return [
        (title, [str(pick(counts[s].values())) if s in counts else "" for s in splits])
        for title, pick in (("smallest class", min), ("largest class", max))
    ]


def _show_lengths(console: Console, lengths: dict[str, Any]) -> None:
    if lengths["min"] == lengths["max"]:
        console.print(f"lengths: all {lengths['max']}")
        return
    totals = np.sum(list(lengths["histogram"].values()), axis=0)
    console.print(f"lengths: {lengths['min']} to {lengths['max']}, median {lengths['median']:g}")
    for low, high, n in zip(lengths["edges"], lengths["edges"][1:], totals, strict=False):
        console.print(f"  {low:>8} – {high - 1:<8} {n:>9}  {'█' * round(40 * n / totals.max())}")


def _show_duplicates(console: Console, duplicates: dict[str, Any] | None) -> None:
    if duplicates is None:
        console.print("duplicates: not looked for (images are decoded when needed, or check_duplicates=false)")
        return
    for kind, title in (("exact", "duplicates"), ("either_strand", "duplicates on either strand")):
        if kind in duplicates:
            counts = duplicates[kind]
            parts = [f"{n} within {name}" for name, n in counts["within"].items() if n]
            parts += [
                f"{n} of {pair.split('/')[1]} in {pair.split('/')[0]}" for pair, n in counts["across"].items() if n
            ]
            console.print(f"{title}: {', '.join(parts) or 'none'}")
