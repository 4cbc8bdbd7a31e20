"""Pictures of scans and saliency. Sequence logos: `logos.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bimamba.plots import BLUE, GREY, ORANGE, new_figure

DPI = 200  # of print
COLOURS = {"forward": BLUE, "backward": ORANGE}
# name, axis label, logarithmic
PANELS = (
    ("step_size", "step size Δ", True),
    ("decay", "decay exp(ΔA)", False),
    ("memory", "memory length (tokens to 1/e)", True),
)
Values = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]


def scan_statistics(values: Values, tied: Mapping[str, bool], longest: int) -> Figure:
    """Distributions of step size, decay and memory length over tokens and heads, a violin a layer.

    The left half of a violin is the forward direction, the right half the backward one. Tied directions share step
    size and decay: one whole, grey violin.

    Args:
        values: `{layer: {direction: {statistic: (tokens, h)}}}`. tied: of each layer. longest: tokens of a sequence.
    """
    layers = list(values)
    figure = new_figure(3 * max(2.7, 1.1 + 0.55 * len(layers)), 3.3, DPI)
    panels = figure.subplots(1, 3)
    for axes, (name, label, log) in zip(panels, PANELS, strict=True):
        for x, layer in enumerate(layers):
            directions = values[layer]
            if tied[layer] and name != "memory":
                _violin(axes, x, directions["forward"][name], "both", GREY, log)
                continue
            for direction, parts in directions.items():
                side = "both" if len(directions) == 1 else direction
                _violin(axes, x, parts[name], side, COLOURS[direction], log)
        if log:
            axes.set_yscale("log")
        if name == "memory":
            _length_line(axes, longest)
        axes.set_xticks(range(len(layers)), layers)
        axes.set(xlabel="layer", ylabel=label, xlim=(-0.6, len(layers) - 0.4))
    handles = _legend(values, tied)
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def _length_line(axes: Any, longest: int) -> None:
    """The longest sequence: a memory beyond it was never used up."""
    axes.axhline(longest, color=GREY, linewidth=0.8, linestyle=":")
    place = dict(
        xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points", ha="right", va="bottom"
    )
    box = dict(boxstyle="square,pad=0.1", facecolor="white", alpha=0.7, linewidth=0)
    axes.annotate(f"length {longest:,}", (1.0, longest), fontsize=7, color=GREY, bbox=box, **place)


def _legend(values: Values, tied: Mapping[str, bool]) -> list[Any]:
    directions = dict.fromkeys(d for parts in values.values() for d in parts)
    handles: list[Any] = [Patch(color=COLOURS[d], alpha=0.5, label=d) for d in directions]
    if any(tied.values()) and len(directions) > 1:
        handles.append(Patch(color=GREY, alpha=0.5, label="both (parameters tied)"))
    return [*handles, Line2D([], [], color="black", marker="o", markersize=3, label="median, quartiles")]


def _violin(axes: Any, x: float, values: np.ndarray, side: str, colour: str, log: bool) -> None:
    """A density from a smoothed histogram, half or whole, with median and quartiles."""
    flat = values.ravel().astype(np.float64)
    flat = np.log10(np.maximum(flat, 1e-12)) if log else flat
    low, high = flat.min(), flat.max()
    pad = max(0.04 * (high - low), 1e-3)
    ends = (low - pad, high + pad) if log else (max(low - pad, 0.0), min(high + pad, 1.0))  # a decay stays in (0, 1)
    edges = np.linspace(*ends, 81)
    count, _ = np.histogram(flat, edges)
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)
    density = np.convolve(count, kernel / kernel.sum(), mode="same")
    width = 0.42 * density / density.max()
    y = (edges[:-1] + edges[1:]) / 2
    centre = {"forward": -0.06, "backward": 0.06, "both": 0.0}[side]
    left = x - (width if side in ("forward", "both") else 0)
    right = x + (width if side in ("backward", "both") else 0)
    quartiles = np.quantile(flat, (0.25, 0.5, 0.75))
    if log:
        y, quartiles = 10**y, 10**quartiles
    axes.fill_betweenx(y, left, right, color=colour, alpha=0.5, linewidth=0)
    axes.plot([x + centre] * 2, quartiles[[0, 2]], color="black", linewidth=1)
    axes.plot([x + centre], quartiles[1:2], color="black", marker="o", markersize=2.5)


def memory_by_head(values: Values, longest: int) -> Figure:
    """Median (dot) and quartiles (line) of the memory length of every head, sorted within layer and direction."""
    layers = list(values)
    heads = max(parts["memory"].shape[1] for directions in values.values() for parts in directions.values())
    figure = new_figure(max(4.0, 1.2 + len(layers) * max(0.7, 0.09 * heads)), 3.2, DPI)
    axes = figure.subplots()
    for x, layer in enumerate(layers):
        for direction, parts in values[layer].items():
            low, middle, high = np.quantile(parts["memory"].astype(np.float64), (0.25, 0.5, 0.75), axis=0)
            order = np.argsort(middle)
            shift = 0.0 if len(values[layer]) == 1 else (-0.21 if direction == "forward" else 0.21)
            places = x + shift + np.linspace(-0.16, 0.16, len(order)) * (len(order) > 1)
            axes.vlines(places, low[order], high[order], color=COLOURS[direction], linewidth=1)
            axes.plot(places, middle[order], "o", color=COLOURS[direction], markersize=3.5)
        if x:
            axes.axvline(x - 0.5, color=GREY, linewidth=0.4)
    _length_line(axes, longest)
    axes.set_yscale("log")
    axes.set_xticks(range(len(layers)), layers)
    axes.set(xlabel="layer (one dot a head)", ylabel="memory length (tokens to 1/e)", xlim=(-0.5, len(layers) - 0.5))
    handles = [Patch(color=COLOURS[d], label=d) for d in dict.fromkeys(d for p in values.values() for d in p)]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return figure


def mixing_matrices(matrices: Mapping[str, np.ndarray], heads: Sequence[int], title: str) -> Figure:
    """Layers down, heads across. Red raises, blue lowers; colours saturate at the 99th percentile of |M| off the
    diagonal, since `D` makes the diagonal large.

    Args:
        matrices: `{layer: (len(heads), l, l)}`. heads: their numbers.
    """
    rows, columns = len(matrices), len(heads)
    side = 1.9 if rows * columns <= 36 else 1.2
    figure = new_figure(side * columns + 0.9, side * rows + 0.9, DPI)
    grid = np.atleast_2d(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True))
    for row, (line, (layer, stack)) in enumerate(zip(grid, matrices.items(), strict=True)):
        for axes, head, M in zip(line, heads, stack, strict=True):
            l = len(M)
            off = np.abs(M[~np.eye(l, dtype=bool)]) if l > 1 else np.abs(M).ravel()
            limit = max(float(np.quantile(off, 0.99)), 1e-12)
            image = axes.imshow(M, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            axes.tick_params(labelsize=6, length=2)
            axes.locator_params(integer=True, nbins=4)
            axes.set_title(f"±{limit:.2g}", fontsize=6, pad=2, color=GREY)
            if row == 0:
                axes.annotate(f"head {head}", (0.5, 1.0), (0, 13), xycoords="axes fraction", textcoords="offset points",
                              ha="center", fontsize=8)  # fmt: skip
        line[0].set_ylabel(f"layer {layer}", fontsize=8)
    bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 2.2 / (rows * side)), aspect=18, pad=0.02)
    bar.set_ticks([-limit, 0, limit], labels=["−", "0", "+"])
    bar.set_label("weight, scale above each panel", fontsize=7)
    figure.supxlabel("from token", fontsize=9)
    figure.supylabel("to token", fontsize=9)
    figure.suptitle(title, fontsize=9)
    return figure


def saliency_maps(images: np.ndarray, maps: np.ndarray, captions: Sequence[str]) -> Figure:
    """Each image above its gradient × input; red raises the score, blue lowers it, each map on its own scale.

    Args:
        images: `(n, height, width, c)` in [0, 1]. maps: `(n, height, width)`. captions: one a row.
    """
    columns = min(8, len(images))
    bands = -(-len(images) // columns)
    figure = new_figure(1.5 * columns + 0.7, 3.35 * bands, DPI)
    grid = figure.subplots(2 * bands, columns, squeeze=False)
    for axes in grid.ravel():
        axes.axis("off")
    for i, (picture, values, caption) in enumerate(zip(images, maps, captions, strict=True)):
        band, column = divmod(i, columns)
        top, bottom = grid[2 * band, column], grid[2 * band + 1, column]
        grey = picture.shape[-1] == 1
        top.imshow(picture[..., 0] if grey else picture, cmap="gray" if grey else None, vmin=0, vmax=1)
        top.set_title(caption, fontsize=7)
        limit = max(float(np.quantile(np.abs(values), 0.995)), 1e-12)
        shown = bottom.imshow(values, cmap="RdBu_r", norm=TwoSlopeNorm(0, -limit, limit), interpolation="nearest")
    bar = figure.colorbar(shown, ax=grid, shrink=0.5, aspect=25, pad=0.01)
    bar.set_ticks([-limit, 0, limit], labels=["lowers", "0", "raises"])
    bar.ax.tick_params(labelsize=7)
    return figure
