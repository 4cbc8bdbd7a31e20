"""Lightning's finders of learning rate and batch size, made to fit schedules and layer-wise rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from bimamba import plots
from bimamba.figures import save_figure
from bimamba.tasks.base import Task


class FindLearningRate(LearningRateFinder):
    """Before the training, raises the learning rate step by step and takes the one of the steepest fall of the loss.

    Smith 2017, "Cyclical Learning Rates". Draws `learning_rate_finder.png`. Lightning's own sets the rate of the
    moment, which the schedule undoes at the next step; here the schedule's highest rate is set, and with layer-wise
    rates each keeps its proportion. A resumed training is left alone: it has its rate.

    Args:
        folder: of the picture.
        apply: train with what was found; False: only say and draw it.
        options: `min_lr`, `max_lr`, `num_training_steps`, `mode`, `early_stop_threshold` of Lightning's finder.
    """

    def __init__(self, folder: str, apply: bool = True, **options: Any) -> None:
        super().__init__(update_attr=False, **options)
        self.folder, self.apply = Path(folder), apply

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or trainer.ckpt_path is not None:
            return
        loop = trainer.fit_loop
        epochs, loop.max_epochs = loop.max_epochs, -1  # the search counts steps, whatever the training's length
        try:
            self.lr_find(trainer, pl_module)
        finally:
            loop.max_epochs = epochs
        if self.optimal_lr:
            self.optimal_lr.results["loss"] = averaged(self.optimal_lr.results["loss"])
        found = self.optimal_lr.suggestion() if self.optimal_lr else None
        if found is None:
            rank_zero_info("Learning rate finder: no suggestion; the loss gives no clear fall, or too few steps.")
            return
        highest = max(group["initial_lr"] if "initial_lr" in group else group["lr"] for group in _groups(trainer))
        rank_zero_info(f"Learning rate finder: {found:.3g} (configured: {highest:.3g}), task.optimizer.lr={found:.3g}")
        if trainer.is_global_zero:
            curve = self.optimal_lr.results if self.optimal_lr else {}
            figure = plots.rate_finder(np.array(curve["lr"]), np.array(curve["loss"]), found)
            save_figure(trainer, figure, self.folder, "learning_rate_finder")
        if self.apply:
            scale_rates(trainer, found / highest)


class FindBatchSize(BatchSizeFinder):
    """Before the training, doubles the batch size until memory runs out, and takes the largest that fits.

    The schedule is made anew for the number of steps that follows. Only for one process, as Lightning's own. The
    learning rate stays what it is: choose it for the size that is found. A resumed training is left alone.

    Args:
        options: those of Lightning's finder.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or trainer.ckpt_path is not None:
            return
        if isinstance(pl_module, Task):
            pl_module.expect_no_graphs("callbacks.batch_size_finder")  # a pass that runs out of memory has no end
        super().on_fit_start(trainer, pl_module)
        rank_zero_info(f"Batch size finder: data.batch_size={self.optimal_batch_size}")
        trainer.strategy.setup_optimizers(trainer)  # schedules count steps, and there are fewer now

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass  # Lightning's own would begin again

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass


def averaged(losses: list[float], beta: float = 0.98) -> list[float]:
    """The moving averages of Lightning's finder (2.6) as they should be.

    An average of n values has to be divided by 1 - beta^n; Lightning takes n + 1, and its curve begins at half its
    height and rises.
    """
    return [v * (1 - beta ** (n + 1)) / (1 - beta**n) for n, v in enumerate(losses, start=1)]


def scale_rates(trainer: Trainer, factor: float) -> None:
    """Multiply all learning rates, those of the moment and those that schedules start from."""
    for group in _groups(trainer):
        for key in ("lr", "initial_lr"):
            if key in group:
                group[key] = group[key] * factor
    for config in trainer.lr_scheduler_configs:
        for name in ("base_lrs", "min_lrs", "_last_lr"):
            if hasattr(config.scheduler, name):
                setattr(config.scheduler, name, [rate * factor for rate in getattr(config.scheduler, name)])


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
