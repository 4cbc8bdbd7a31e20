"""Figures of a run: confusion matrix, ROC and precision-recall, reliability, learning curves, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"
MAX_NAMED = 40  # classes; beyond that, names and numbers in a confusion matrix cannot be read


def new_figure(width: float, height: float, dpi: int = 120) -> Figure:
    """A figure, in inches, that belongs to no window and no global state: plots work in threads, without a display."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str], title: str = "") -> Figure:
    """Rows true, columns predicted; colour is the share of the row, numbers are counts.

    Args:
        counts: int `(k, k)`, or for multilabel `(k, 2, 2)`: one small matrix a label.
        class_names: in the order of the axes.
    """
    counts = np.asarray(counts)
    if counts.ndim == 3:
        return _label_matrices(counts, class_names, title)
    k = len(class_names)
    side = min(max(3.2, 1.6 + 0.5 * k), 14)
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if k <= MAX_NAMED:
        axes.set_xticks(range(k), class_names, rotation=45 if max(map(len, class_names)) > 3 else 0, ha="right")
        axes.set_yticks(range(k), class_names)
        if max(map(len, class_names)) <= 3:
            axes.set_xticks(range(k), class_names, ha="center")
    if k <= 20:
        for i, j in np.ndindex(k, k):
            if counts[i, j]:
                axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=8 if k > 5 else 10)
                axes.texts[-1].set_color("white" if shares[i, j] > 0.6 else "black")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    return figure


def _label_matrices(counts: np.ndarray, names: Sequence[str], title: str) -> Figure:
    shown = min(len(names), 24)
    columns = min(shown, 6)
    rows = -(-shown // columns)
    figure = new_figure(1.9 * columns + 0.6, 2.1 * rows + 0.4)
    figure.suptitle(title + ("" if shown == len(names) else f" (first {shown} of {len(names)} labels)"))
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in grid[shown:]:
        axes.set_visible(False)
    for axes, matrix, name in zip(grid, counts, names, strict=False):
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(name, fontsize=9)
        axes.set_xticks([0, 1], ["no", "yes"], fontsize=7)
        axes.set_yticks([0, 1], ["no", "yes"], fontsize=7)
        for i, j in np.ndindex(2, 2):
            colour = "white" if shares[i, j] > 0.6 else "black"
            axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", fontsize=8, color=colour)
    return figure


def roc_and_precision_recall(probability: np.ndarray, label: np.ndarray, positive: str) -> Figure:
    """Both curves of a binary problem.

    Args:
        probability: `(n)`, of the positive class. label: `(n)`, 0 or 1; both must occur.
        positive: name of the positive class.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

    figure = new_figure(8.4, 4)
    left, right = figure.subplots(1, 2)
    false_rate, true_rate, _ = roc_curve(label, probability)
    left.plot(false_rate, true_rate, color=BLUE)
    left.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    left.set(xlabel="1 − specificity", ylabel="sensitivity")
    left.set_title(f"ROC, area {roc_auc_score(label, probability):.3f}")
    precision, recall, _ = precision_recall_curve(label, probability)
    right.plot(recall, precision, color=BLUE)
    right.axhline(np.mean(label), color=GREY, linewidth=0.8, linestyle=":")
    right.set(xlabel="recall", ylabel="precision", ylim=(-0.02, 1.02))
    right.set_title(f"precision and recall, area {average_precision_score(label, probability):.3f}")
    figure.suptitle(f"positive class: {positive}", fontsize=10)
    return figure


def reliability(confidence: np.ndarray, correct: np.ndarray, xlabel: str, n_bins: int = 15) -> Figure:
    """Observed frequency against predicted probability, with the number of samples below.

    Args:
        confidence: `(n)`, predicted probabilities in [0, 1]. correct: `(n)`, 0 or 1: whether the event happened.
        xlabel: what the probability is of.
    """
    edges = np.linspace(0, 1, n_bins + 1)
    index = np.clip(np.digitize(confidence, edges) - 1, 0, n_bins - 1)
    count = np.bincount(index, minlength=n_bins)
    filled = count > 0
    mean = np.bincount(index, confidence, n_bins)[filled] / count[filled]
    frequency = np.bincount(index, correct, n_bins)[filled] / count[filled]
    error = float((np.abs(mean - frequency) * count[filled]).sum() / max(count.sum(), 1))
    figure = new_figure(4.4, 5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    top.plot(mean, frequency, color=BLUE, marker="o", markersize=4)
    top.set(ylabel="observed frequency", xlim=(0, 1), ylim=(-0.02, 1.02), title=f"reliability, error {error:.3f}")
    bottom.bar((edges[:-1] + edges[1:]) / 2, count, width=0.9 / n_bins, color=BLUE)
    bottom.set(ylabel="samples", xlabel=xlabel)
    bottom.set_yscale("symlog")
    return figure


def regression_scatter(prediction: np.ndarray, label: np.ndarray, names: Sequence[str]) -> Figure:
    """Predicted against true values, one panel a target; `(n, k)` each."""
    shown = min(len(names), 6)
    figure = new_figure(4 * shown, 4)
    for axes, i in zip(np.atleast_1d(figure.subplots(1, shown)), range(shown), strict=True):
        axes.scatter(label[:, i], prediction[:, i], s=6, alpha=0.5, color=BLUE)
        low, high = min(label[:, i].min(), prediction[:, i].min()), max(label[:, i].max(), prediction[:, i].max())
        axes.plot([low, high], [low, high], color=GREY, linewidth=0.8, linestyle=":")
        axes.set(xlabel="true", ylabel="predicted", title=names[i])
    return figure


def learning_curves(history: Sequence[Mapping[str, Any]], best_epoch: int | None = None) -> Figure:
    """Train and validation values of each metric over the epochs.

    Args:
        history: one dict an epoch: `epoch`, and metrics named `train/…` and `val/…`.
        best_epoch: marked by a line.
    """
    names = {key.split("/", 1)[1] for row in history for key in row if key.startswith(("train/", "val/"))}
    preferred = ["loss", "accuracy", "mcc", "f1", "balanced_accuracy", "auroc", "r2", "pearson"]
    shown = [n for n in preferred if n in names][:6] or ["loss"]
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    figure = new_figure(3.8 * columns, 2.9 * rows)
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    for axes, name in zip(grid, shown, strict=False):
        for split, colour in (("train", ORANGE), ("val", BLUE)):
            points = [(r["epoch"], r[f"{split}/{name}"]) for r in history if f"{split}/{name}" in r]
            if points:
                marker = "o" if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), color=colour, label=split, marker=marker, markersize=3)
        if best_epoch is not None:
            axes.axvline(best_epoch, color=GREY, linewidth=0.8, linestyle=":", label="best")
        axes.set(title=name.replace("_", " "), xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if name == "loss":
            axes.set_ylim(bottom=0)
    handles, labels = grid[0].get_legend_handles_labels()
    if handles:
        grid[0].legend(handles, labels, fontsize=8)
    return figure


def rate_finder(rates: np.ndarray, losses: np.ndarray, found: float) -> Figure:
    """Loss over the learning rate `(n,)` that rose from step to step, and the rate that was found."""
    figure = new_figure(4.6, 3.2)
    axes = figure.subplots()
    axes.plot(rates, losses, color=BLUE)
    axes.axvline(found, color=ORANGE, linewidth=0.8, linestyle=":", label=f"{found:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (smoothed)", title="learning rate finder")
    axes.legend(fontsize=8)
    return figure


def image_examples(images: np.ndarray, captions: Sequence[str], wrong: Sequence[bool]) -> Figure:
    """A grid of pictures; captions of wrong predictions are orange.

    Args:
        images: `(n, height, width, c)` in [0, 1], c of 1 or 3.
        captions, wrong: one a picture.
    """
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(1.5 * columns, 1.75 * rows)
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, caption, is_wrong in zip(grid, images, captions, wrong, strict=False):
        grey = image.shape[-1] == 1
        axes.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)
        axes.set_title(caption, fontsize=7, color=ORANGE if is_wrong else "black")
    return figure


def repetitions(settings: Mapping[str, tuple[np.ndarray, float, float]], metric: str) -> Figure:
    """Every run of each setting (grey), and the mean with its interval (blue).

    Args:
        settings: `{name: (values (n), low, high)}`; NaN bounds: no interval. metric: the axis.
    """
    longest = max(map(len, settings))
    figure = new_figure(3.6 + min(0.07 * longest, 4), 1.0 + 0.42 * len(settings), dpi=200)
    axes = figure.subplots()
    for y, (values, low, high) in enumerate(settings.values()):
        spread = np.linspace(-0.14, 0.14, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(values, y + spread, "o", color=GREY, alpha=0.6, markersize=3.5, markeredgewidth=0)
        if not np.isnan(low):
            axes.plot([low, high], [y, y], color=BLUE, linewidth=2, solid_capstyle="butt")
        axes.plot([values.mean()], [y], "D", color=BLUE, markersize=5)
    axes.set_yticks(range(len(settings)), [f"{name} (n={len(v)})" for name, (v, _, _) in settings.items()], fontsize=8)
    axes.set(ylim=(len(settings) - 0.5, -0.5), xlabel=metric)
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=5)  # more would run into each other
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
