"""The best and the last checkpoint of a training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor


class Checkpoints(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, where `last.ckpt` is the newest state and steps do not touch the best one.

    Lightning's own (2.6) writes `last.ckpt` only along with a new best one, and with `every_n_train_steps` it judges
    steps in mid-epoch by the last epoch's validation and saves nothing before the first one. Here the best is decided
    where the metric is measured, and `every_n_train_steps` and `train_time_interval` add saves of `last.ckpt`.

    `best_metrics` are all validation metrics of the best checkpoint, which a resumed training still knows.

    Args:
        every_n_train_steps: also save `last.ckpt` after so many optimizer steps; None: at the ends of epochs only.
        train_time_interval: also save it after so much time, for instance `{minutes: 30}`; the first process's clock
            counts, which several look at every `trainer.log_every_n_steps` batches.
        options: those of `ModelCheckpoint`.

    Raises:
        ValueError: a number of steps or a time below 1, an unknown unit of time, or one name for several files.
    """

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = None,
        train_time_interval: Mapping[str, float] | timedelta | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if self.save_top_k not in (0, 1) and "{" not in (self.filename or "{"):
            raise ValueError(
                f"callbacks.model_checkpoint.save_top_k={self.save_top_k}: {self.filename!r} is one name for all of "
                "them, and the last one would overwrite the best; give each its own, for instance "
                "callbacks.model_checkpoint.filename='\"epoch_{epoch}\"'"
            )
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps: expected at least 1, or null, got {every_n_train_steps}")
        if isinstance(train_time_interval, Mapping):
            given = dict(train_time_interval)
            try:
                train_time_interval = timedelta(**given)
            except TypeError as error:
                raise ValueError(f"train_time_interval: expected for instance {{minutes: 30}}, got {given}") from error
        if train_time_interval is not None and train_time_interval <= timedelta(0):
            raise ValueError(f"train_time_interval: expected more than nothing, got {train_time_interval}")
        self.last_every, self.last_interval = every_n_train_steps, train_time_interval
        self.best_metrics: dict[str, float] = {}
        self._due_after_validation = False

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best_metrics": self.best_metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("dirpath") != self.dirpath:
            state_dict = self._moved(state_dict)
        super().load_state_dict(state_dict)
        self.best_metrics = dict(state_dict.get("best_metrics", {}))  # earlier versions have none

    def _moved(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of a run whose folder was moved or copied, by the files that are in this folder now.

        Lightning's own (2.6) would forget the best score, and keep a path to the old folder.
        """

        def here(path: str) -> str:
            found = Path(self.dirpath or "", Path(path).name)
            return str(found) if path and found.is_file() else ""

        best = here(state["best_model_path"])
        names = ("kth_best_model_path", "last_model_path")
        moved: dict[str, Any] = {"dirpath": self.dirpath, "best_model_path": best}
        moved |= {name: here(state.get(name, "")) for name in names}
        kept = {here(path): score for path, score in state.get("best_k_models", {}).items() if here(path)}
        if not best:  # it stayed behind: the best one of this folder is yet to come
            moved |= {"best_model_score": None, "kth_best_model_path": "", "kth_value": self.kth_value}
            moved["best_metrics"] = kept = {}
        return state | moved | {"best_k_models": kept}

    def _update_best_and_save(self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        best = self.best_model_score
        # Of several that are kept, this one may be worse
        if best is None or (current < best if self.mode == "min" else current > best):
            self._remember(monitor_candidates)
        super()._update_best_and_save(current, trainer, monitor_candidates)

    def _save_none_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._remember(monitor_candidates)
        super()._save_none_monitor_checkpoint(trainer, monitor_candidates)

    def _remember(self, metrics: Mapping[str, Tensor]) -> None:
        """Before the checkpoint is saved, which holds them."""
        self.best_metrics = {k: float(v) for k, v in metrics.items() if k.startswith("val/") or k == self.monitor}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        epoch_loop = trainer.fit_loop.epoch_loop
        if trainer.fast_dev_run or epoch_loop._should_accumulate() or epoch_loop.batch_progress.is_last_batch:
            return  # half-summed gradients are not saved; the end of the epoch saves by itself, after validation
        due = self.last_every is not None and trainer.global_step % self.last_every == 0
        if self.last_interval is not None and processes_meet(trainer, batch_idx):  # one clock for all of them
            passed = time.monotonic() - (self._last_time_checked or 0.0) >= self.last_interval.total_seconds()
            due = due or bool(trainer.strategy.broadcast(passed))
        if due and validation_follows(trainer):
            self._due_after_validation = True
        elif due:
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._due_after_validation and not trainer.sanity_checking:
            self._due_after_validation = False
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        done = (trainer.current_epoch + 1) % max(self._every_n_epochs, 1) == 0
        if done and not trainer.fast_dev_run and self._last_global_step_saved != trainer.global_step:
            self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        if not self.save_last:
            return
        judged = self._last_global_step_saved
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._last_global_step_saved = judged  # the best one is still to be decided at this step
        self._last_time_checked = time.monotonic()


def processes_meet(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the processes ask each other after this batch, the last one of an optimizer step: about every
    `trainer.log_every_n_steps` batches, for their hosts wait for the devices then. A process on its own may look after
    every one."""
    every, done = max(1, trainer.log_every_n_steps), batch_idx + 1
    before = max(0, done - trainer.accumulate_grad_batches)  # where they could have asked last
    return trainer.world_size == 1 or done // every > before // every


def validation_follows(trainer: Trainer) -> bool:
    """Whether the training batch that ends at this moment is followed by a validation in mid-epoch.

    Lightning (2.6) takes a state that was saved between the two for one after the validation, and a training that is
    resumed from it would leave the validation out. So what is due at such a step is saved when the validation is over.
    """
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
