"""Figures of the first part of a training are not those of the next one's checkpoints, nor of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from bimamba.config import save
from bimamba.predictions import FILE


class SetAside(Callback):
    """Renames what an earlier part of a resumed training has measured, before this part's first step, and writes this
    part's configuration.

    From then on `best.ckpt` may be another one, and a training that is killed must count as unfinished. One that fails
    before, or has nothing left to train, leaves everything as it was.

    Args:
        output_dir: the run's folder. plot_dir: of its pictures. config: of this part, resolved.
    """

    def __init__(self, output_dir: str, plot_dir: str, config: Mapping[str, Any]) -> None:
        self.output_dir, self.plot_dir, self.config = Path(output_dir), Path(plot_dir), config
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
        save(self.config, self.output_dir / "config.yaml")
