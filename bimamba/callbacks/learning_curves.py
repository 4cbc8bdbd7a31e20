"""Learning curves and the validation's confusion matrix as pictures in the run's folder."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from bimamba import plots
from bimamba.figures import save_figure
from bimamba.spec import spec_of


class LearningCurves(Callback):
    """Draws `learning_curves.png` and `confusion_matrix_val.png`: now and then while training, and at its end.

    The history is saved in checkpoints, so the curves of a resumed training begin at its first epoch.

    Args:
        folder: of the pictures.
        seconds: least time between two drawings (one takes about half a second).
    """

    def __init__(self, folder: str, seconds: float = 60.0) -> None:
        self.folder = Path(folder)
        self.seconds = seconds
        self.history: list[dict[str, Any]] = []
        self._drawn = -math.inf
        self._validated = False  # since the last row of the history

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning keeps showing the last validation's metrics; an epoch without one has none of its own.
        kinds = ("train/", "val/") if self._validated else ("train/",)
        self._validated = False
        shown = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(kinds)}
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, **shown}
        self.history = [r for r in self.history if r["epoch"] < row["epoch"]] + [row]
        if trainer.is_global_zero and time.monotonic() - self._drawn > self.seconds and len(self.history) > 1:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._draw(trainer, pl_module, key="val/confusion_matrix")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero:
            with suppress(OSError):  # on a full disk the error that ended the training is the one to be read
                self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule, key: str | None = None) -> None:
        if trainer.fast_dev_run or not self.history:
            return
        self._drawn = time.monotonic()
        curves = plots.learning_curves(self.history, self._best_epoch(trainer))
        save_figure(trainer, curves, self.folder, "learning_curves")
        confusion: Any = pl_module.confusion
        counts = confusion.get("val")
        if counts is not None:
            title = f"validation, epoch {self.history[-1]['epoch']}"
            figure = plots.confusion_matrix(counts.numpy(), spec_of(pl_module).class_names, title)
            save_figure(trainer, figure, self.folder, "confusion_matrix_val", key)

    def _best_epoch(self, trainer: Trainer) -> int | None:
        checkpoints = trainer.checkpoint_callback
        monitor, mode = getattr(checkpoints, "monitor", None), getattr(checkpoints, "mode", "min")
        scored = [(r[monitor], r["epoch"]) for r in self.history if monitor in r and not math.isnan(r[monitor])]
        if not scored:
            return None
        best = (max if mode == "max" else min)(score for score, _ in scored)
        return next(epoch for score, epoch in scored if score == best)
