"""Step size, decay and effective memory length of each layer and direction, over the tokens of real inputs.

* step size: `delta = clamp(softplus(dt + dt_bias), *dt_limit)`, how much of a token enters the state.
* decay: `exp(delta A)`, what a token leaves of the state before it.
* memory length: the number of further tokens, in the direction of the scan, until the product of their decays has
  fallen to 1/e: the smallest k with `sum_{j=1..k} delta_{t+j} |A| >= 1`. Where the sequence ends before that, it is
  continued at the sequence's mean rate, and the token counts as censored.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from bimamba.explain.record import Scan

STATISTICS = ("step_size", "decay", "memory")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def memory_length(rate: Tensor) -> tuple[Tensor, Tensor]:
    """Effective memory lengths of one sequence.

    Args:
        rate: `(l, h)`, `delta |A|` of each token in the direction of the scan, not negative.

    Returns:
        float64 `(l, h)`, at least 1, and bool `(l, h)`: whether the sequence ended first.
    """
    rate = rate.double().T.contiguous()  # h l
    l = rate.shape[1]
    total = rate.cumsum(1)
    goal = total + 1.0
    # the first place whose sum reaches the goal; 1e-12: a rate of exactly 1 reaches it with one token, not with two
    reached = torch.searchsorted(total, goal - 1e-12)
    position = torch.arange(l, dtype=torch.float64)
    mean = rate.mean(1, keepdim=True).clamp(min=1e-12)
    beyond = l - 1 - position + (goal - total[:, -1:]) / mean
    censored = reached == l
    return torch.where(censored, beyond.ceil(), reached - position).T, censored.T


class ScanStatistics:
    """Collects the three statistics over batches, by layer, direction and head.

    Args:
        max_values: values that are kept of each layer, direction and head; of more, a seeded draw for the quantiles
            and pictures.
        seed: of the draw.
    """

    def __init__(self, max_values: int = 20_000, seed: int = 0) -> None:
        if max_values < 1:
            raise ValueError(f"explain.statistics.max_values: expected at least 1, got {max_values}")
        self.max_values = max_values
        self._draw = np.random.default_rng(seed)
        self._values: dict[tuple[str, str, str], list[np.ndarray]] = {}
        self._count: dict[tuple[str, str], int] = {}
        self._censored: dict[tuple[str, str], float] = {}
        self.tied: dict[str, bool] = {}
        self.longest = 0  # tokens of a sequence

    def update(self, layer: str, scan: Scan) -> None:
        """Adds the real tokens of a recorded scan; padding has a step size of exactly 0 and is left out."""
        self.tied[layer] = scan.tied
        for name, direction in scan.directions().items():
            delta = scan.step_sizes(direction).float().cpu()
            A = direction.A.float().cpu()
            for row in delta:
                row = row[(row > 0).any(-1)]
                self.longest = max(self.longest, len(row))
                if name == "backward":
                    row = row.flip(0)
                self._add(layer, name, row, A)

    def _add(self, layer: str, direction: str, delta: Tensor, A: Tensor) -> None:
        rate = delta * A.abs()
        memory, censored = memory_length(rate)
        key = (layer, direction)
        self._count[key] = self._count.get(key, 0) + len(delta)
        self._censored[key] = self._censored.get(key, 0.0) + float(censored.float().mean(1).sum())
        for name, value in zip(STATISTICS, (delta, torch.exp(-rate), memory), strict=True):
            self._values.setdefault((layer, direction, name), []).append(value.numpy().astype(np.float32))
        if sum(map(len, self._values[(layer, direction, "memory")])) > 2 * self.max_values:
            self._thin(layer, direction)

    def _thin(self, layer: str, direction: str) -> None:
        """Keep a draw of the tokens; the same tokens of all three statistics."""
        total = sum(map(len, self._values[(layer, direction, "memory")]))
        if total <= self.max_values:
            return
        chosen = np.sort(self._draw.choice(total, self.max_values, replace=False))
        for name in STATISTICS:
            self._values[(layer, direction, name)] = [np.concatenate(self._values[(layer, direction, name)])[chosen]]

    def values(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        """`{layer: {direction: {statistic: (tokens, h)}}}`."""
        out: dict[str, dict[str, dict[str, np.ndarray]]] = {}
        for layer, direction in self._count:
            self._thin(layer, direction)
            parts = {name: np.concatenate(self._values[(layer, direction, name)]) for name in STATISTICS}
            out.setdefault(layer, {})[direction] = parts
        return out

    def table(self) -> list[dict[str, object]]:
        """A row a layer, direction, head and statistic: mean, quantiles, tokens, and the share that is censored."""
        rows: list[dict[str, object]] = []
        for layer, directions in self.values().items():
            for direction, parts in directions.items():
                key = (layer, direction)
                share = self._censored[key] / max(self._count[key], 1)
                for name in STATISTICS:
                    for head, column in enumerate(parts[name].T):
                        quantiles = np.quantile(column.astype(np.float64), QUANTILES)
                        row = {"layer": layer, "direction": direction, "tied": self.tied[layer], "head": head}
                        row |= {"statistic": name, "mean": float(column.mean())}
                        row |= {f"q{round(100 * q):02d}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)}
                        row |= {"tokens": self._count[key], "censored": share if name == "memory" else None}
                        rows.append(row)
        return rows


def collect(batches: Iterable[dict[str, Scan]], max_values: int, seed: int) -> ScanStatistics:
    """Statistics over recorded forward passes."""
    statistics = ScanStatistics(max_values, seed)
    for scans in batches:
        for layer, scan in scans.items():
            statistics.update(layer, scan)
    return statistics
