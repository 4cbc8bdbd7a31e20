"""Saving figures and tables into the run's folder, showing them to W&B, and pictures as people see them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from torch import Tensor, tensor

from bimamba.loggers import wandb_loggers
from bimamba.spec import DataSpec


def save_figure(trainer: Trainer, figure: Any, folder: Path, name: str, key: str | None = None) -> Path:
    """Write `<folder>/<name>.png`; under a key also to W&B. Call on rank zero."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path)
    if key:
        for logger in wandb_loggers(trainer):
            logger.log_image(key, [str(path)])
    return path


def save_table(
    trainer: Trainer, columns: Sequence[str], rows: Sequence[Sequence[Any]], folder: Path, name: str, key: str
) -> Path:
    """Write `<folder>/<name>.csv`, and a table to W&B. Call on rank zero."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    for logger in wandb_loggers(trainer):
        logger.log_table(key, columns=list(columns), data=[list(row) for row in rows])
    return path


def denormalise(spec: DataSpec, image: Tensor) -> np.ndarray:
    """A normalised image `(c, height, width)` to `(height, width, c)` in [0, 1], float32."""
    image = image.float().cpu()
    if spec.mean is not None and spec.std is not None:
        image = image * tensor(spec.std)[:, None, None] + tensor(spec.mean)[:, None, None]
    return image.clamp(0, 1).permute(1, 2, 0).numpy()
