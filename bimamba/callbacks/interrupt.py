"""Ctrl-C and the signals of a scheduler end a training between two steps, and leave a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from bimamba.callbacks.checkpoints import processes_meet, validation_follows
from bimamba.runs import newest_checkpoint, quoted

REQUEUE = "SIGUSR2"  # submitit's, which puts the job into Slurm's queue again
LIGHTNINGS_QUESTION = "_broadcast_sigterm_tensor"  # a method of its epoch loop
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # Ctrl-C; a scheduler's end of time or preemption; Slurm's --signal=USR1


class Stopped(SystemExit):
    """A training that a signal ended, after its checkpoint was written, if there are any. The exit code is 128 + the
    signal's number."""


class StopOnInterrupt(Callback):
    """Ends a training on Ctrl-C, SIGTERM or SIGUSR1; for one with `trainer.enable_checkpointing=false`.

    The signal is only noted; the training stops after the batch in hand (and after its accumulation of gradients, or
    the validation that is running). The process ends with 128 + the signal's number (130, 143, 138), so that nobody
    takes it for a finished training. A second Ctrl-C stops at once.

    SIGUSR2 belongs to whoever has a handler for it, as submitit has (`hydra=submitit`): that handler is called at last,
    which queues the job again.

    Several processes agree every `trainer.log_every_n_steps` batches on whether one of them was told to stop.
    Lightning's own question (2.6, about SIGTERM in the first process alone) is left out meanwhile: it comes before
    every batch, and the host waits for all that the device has still to do.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received = None
        if trainer.fast_dev_run or threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set handlers
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        if hasattr(signal, REQUEUE) and callable(signal.getsignal(getattr(signal, REQUEUE))):
            numbers.append(getattr(signal, REQUEUE))
        for number in numbers:
            self._before[number] = signal.signal(number, self._note)
        vars(trainer.fit_loop.epoch_loop)[LIGHTNINGS_QUESTION] = lambda: None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)
        again = "; Ctrl-C again stops at once, without saving" if number == signal.SIGINT else ""
        _say(f"{self._received.name}: stopping after this batch (or validation){again} …")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        epoch_loop = trainer.fit_loop.epoch_loop
        # The end of an epoch comes after its validation and its own checkpoints.
        if epoch_loop._should_accumulate() or epoch_loop.batch_progress.is_last_batch or validation_follows(trainer):
            return
        if processes_meet(trainer, batch_idx):
            self._stop_if_told(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch_loop = trainer.fit_loop.epoch_loop
        in_mid_epoch = trainer.state.fn == "fit" and not trainer.sanity_checking
        if in_mid_epoch and not epoch_loop._should_accumulate() and not epoch_loop.batch_progress.is_last_batch:
            self._stop_if_told(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_told(trainer)

    def _stop_if_told(self, trainer: Trainer) -> None:
        told = int(self._received or 0)
        if trainer.world_size > 1:
            told = int(
                trainer.strategy.reduce(torch.tensor(told, device=trainer.strategy.root_device), reduce_op="max")
            )
        if not told or trainer.fast_dev_run:
            return
        _say(f"Stopped at step {trainer.global_step} (epoch {trainer.current_epoch}). {self._save(trainer)}")
        if told == getattr(signal, REQUEUE, None) and callable(handler := self._before.get(signal.Signals(told))):
            handler(told, None)  # submitit's, in the first process: queues the job, and ends this process
        raise Stopped(128 + told)

    def _save(self, trainer: Trainer) -> str:
        """What is kept of the training, in words."""
        return "Nothing is saved: trainer.enable_checkpointing=false"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(trainer)

    def _restore(self, trainer: Trainer) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
        vars(trainer.fit_loop.epoch_loop).pop(LIGHTNINGS_QUESTION, None)  # the class has its own


class SaveOnInterrupt(StopOnInterrupt, Checkpoint):
    """`StopOnInterrupt` that saves `interrupted.ckpt`, and says how to go on.

    The checkpoint is that of a step, and the resumed training equals an uninterrupted one. A second Ctrl-C saves
    nothing.

    Args:
        dirpath: folder of the checkpoint.
    """

    # A Checkpoint is called after all other callbacks: what it saves holds everything that they did at this step.

    def __init__(self, dirpath: str) -> None:
        super().__init__()
        self.path = Path(dirpath) / "interrupted.ckpt"

    def _save(self, trainer: Trainer) -> str:
        trainer.save_checkpoint(self.path)
        return f"Saved {self.path}\nGo on with:  python train.py ckpt_path={quoted(self.path)}"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            newest = newest_checkpoint(self.path.parent)
            where = f"The newest checkpoint is {newest}" if newest else "There is no checkpoint yet."
            _say(f"Stopped at step {trainer.global_step} without saving. {where}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        # A resumed training that reached its end has no use for the interruption of its first part.
        if trainer.is_global_zero and self.path.exists():
            self.path.unlink()


@rank_zero_only
def _say(message: str) -> None:
    os.write(1, f"\n{message}\n".encode())  # in a handler print() could meet a print() that it interrupted
