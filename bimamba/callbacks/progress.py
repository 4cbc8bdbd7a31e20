"""The progress bar, with a loss that the device is not waited for at each step."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Lightning's bar and the last step's `train/loss_step`, which is read now and then.

    What is logged with `prog_bar=True` Lightning reads from the device at each step, and the processor cannot prepare
    the next one meanwhile.

    Args:
        seconds: least time between two readings of the loss.
        options: of `RichProgressBar`.
    """

    def __init__(self, seconds: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.seconds = seconds
        self._loss: float | None = None
        self._read = -math.inf

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._loss, self._read = None, -math.inf

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        items: dict[str, Any] = super().get_metrics(trainer, pl_module)
        now = time.monotonic()
        if trainer.training and now - self._read >= self.seconds:
            loss = trainer.callback_metrics.get("train/loss_step")
            if loss is not None:
                self._loss, self._read = float(loss), now
        if self._loss is not None:
            items["train/loss_step"] = self._loss
        return items
