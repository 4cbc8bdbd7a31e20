"""Figures of the first part of a training are not those of the next one's checkpoints."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from bimamba.predictions import FILE


class SetAside(Callback):
    """Renames what an earlier part of a resumed training has measured, before this part's first step.

    From then on `best.ckpt` may be another one, and a training that is killed must count as unfinished. One that has
    nothing left to train keeps everything.

    Args:
        output_dir: the run's folder. plot_dir: of its pictures.
    """

    def __init__(self, output_dir: str, plot_dir: str) -> None:
        self.output_dir, self.plot_dir = Path(output_dir), Path(plot_dir)
        self._done = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._done or trainer.fast_dev_run:
            return
        self._done = True
        if not trainer.is_global_zero:
            return
        stamp = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        for path in (self.output_dir / "metrics.json", self.output_dir / FILE, *self.plot_dir.glob("*_test.png")):
            if path.is_file():
                path.rename(path.with_name(f"{path.stem}_{stamp}{path.suffix}"))
