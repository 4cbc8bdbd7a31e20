"""Sequence logos, drawn with matplotlib's own letters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath

from bimamba.explain.draw import DPI
from bimamba.plots import GREY, new_figure

# The colours of most published logos; other alphabets take matplotlib's in turn.
DNA_COLOURS = {"A": "#109648", "C": "#255c99", "G": "#f7b32b", "T": "#d62839", "U": "#d62839"}


@lru_cache(maxsize=64)
def _glyph(letter: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices, scaled to the unit square, and codes of a letter's outline."""
    outline = TextPath((0, 0), letter, size=1, prop=FontProperties(family="DejaVu Sans", weight="bold"))
    box = outline.get_extents()
    vertices = (outline.vertices - (box.x0, box.y0)) / (box.width, box.height)
    return vertices, outline.codes


def _colour(letter: str) -> str:
    return DNA_COLOURS.get(letter, f"C{ord(letter) % 10}")


def draw_logo(axes: Any, heights: np.ndarray, letters: str, first: int = 1) -> None:
    """Stacks of letters: positive heights upwards, the largest on top; negative ones downwards, turned over.

    Args:
        heights: `(l, len(letters))`, not NaN. letters: one a column. first: number of the first position.
    """
    outlines: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    low = high = 0.0
    for position, column in enumerate(heights):
        for sign in (1, -1):
            foot = 0.0
            for k in sorted(np.flatnonzero(column * sign > 0), key=lambda k: abs(column[k])):
                vertices, codes = _glyph(letters[k])
                height = float(column[k])
                # 0.96: a hair of space between neighbours
                place = np.array([first + position - 0.48, foot])
                outlines.setdefault(letters[k], []).append((vertices * (0.96, height) + place, codes))
                foot += height
            low, high = min(low, foot), max(high, foot)
    for letter, parts in outlines.items():
        path = Path(np.concatenate([v for v, _ in parts]), np.concatenate([c for _, c in parts]))
        axes.add_patch(PathPatch(path, facecolor=_colour(letter), linewidth=0))
    margin = 0.04 * max(high - low, 1e-12)
    axes.set(xlim=(first - 0.7, first + len(heights) - 0.3), ylim=(low - margin, high + margin))
    axes.axhline(0, color="black", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _width(l: int) -> float:
    return min(max(4.0, 1.4 + 0.13 * l), 40.0)


def mutagenesis(
    change: np.ndarray, heights: np.ndarray, tokens: np.ndarray, letters: str, title: str, first: int = 1
) -> Figure:
    """One sequence: what each letter counts (logo) above what each substitution does (map).

    Args:
        change: `(l, k)`, score of the mutant less that of the sequence. heights: `(l, k)`, of the logo.
        tokens: `(l)`, ids, 1 = `letters[0]`. letters: k of them. first: number of the first position.
    """
    l = len(tokens)
    figure = new_figure(_width(l), 3.1, DPI)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    draw_logo(top, heights, letters, first)
    top.set_ylabel("importance", fontsize=8)
    top.set_title(title, fontsize=9)
    limit = max(float(np.nanquantile(np.abs(change), 0.995)), 1e-12)
    extent = (first - 0.5, first + l - 0.5, len(letters) - 0.5, -0.5)
    image = bottom.imshow(change.T, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", extent=extent,
                          interpolation="nearest")  # fmt: skip
    known = (tokens >= 1) & (tokens <= len(letters))
    bottom.plot(first + np.flatnonzero(known), tokens[known] - 1, ".", color=GREY, markersize=2)
    bottom.set_yticks(range(len(letters)), list(letters), fontsize=7)
    bottom.set_xlabel("position", fontsize=8)
    bottom.set_ylabel("replaced by", fontsize=8)
    for axes in (top, bottom):
        axes.tick_params(labelsize=7)
    bar = figure.colorbar(image, ax=bottom, pad=0.01, aspect=8)
    bar.set_label("change of score", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return figure


def mean_logos(heights: Mapping[str, np.ndarray], counts: Mapping[str, int], letters: str, first: int = 1) -> Figure:
    """A logo a class, over all its sequences, on one scale.

    Args:
        heights: `{class: (l, k)}`. counts: sequences of each.
    """
    l = max(map(len, heights.values()))
    figure = new_figure(_width(l), 0.5 + 1.7 * len(heights), DPI)
    panels = figure.subplots(len(heights), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    limits = []
    for axes, (name, values) in zip(panels, heights.items(), strict=True):
        draw_logo(axes, values, letters, first)
        limits.append(axes.get_ylim())
        axes.set_ylabel("mean importance", fontsize=8)
        axes.set_title(f"{name} (n = {counts[name]:,})", fontsize=9)
        axes.tick_params(labelsize=7)
    panels[0].set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    panels[-1].set_xlabel("position", fontsize=8)
    return figure
