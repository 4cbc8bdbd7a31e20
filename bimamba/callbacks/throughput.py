"""Samples and tokens per second of training, and the memory that it took."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs `performance/samples_per_second` and `performance/tokens_per_second` over all processes.

    Measured over the steps between two logged ones, waiting for data included, validation and checkpoints excluded. The
    first steps (kernel compilation, cold caches, starting workers) do not count. Tokens are real ones: padding does not
    count. Every process is assumed to have batches of the same size. On a GPU also `performance/peak_memory_mib`, the
    most that tensors of this process have taken since the training began.

    Args:
        skip_steps: number of first steps that are left out.
    """

    def __init__(self, skip_steps: int = 5) -> None:
        if skip_steps < 0:
            raise ValueError(f"skip_steps: expected 0 or more, got {skip_steps}")
        self.skip_steps = skip_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = 0
        self._reset()
        if pl_module.device.type == "cuda":  # of this run, not of those before it in a sweep
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def _reset(self) -> None:
        self._last: float | None = None
        self._seconds, self._samples = 0.0, 0
        self._tokens: Any = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = None  # the clock stands until the next training batch begins

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._last is None:
            self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seen += 1
        if self._seen <= self.skip_steps:
            self._last = time.perf_counter()
            return
        samples = len(batch["id"]) if "seq_idx" in batch else len(batch["inputs"])  # a packed row holds several
        self._samples += samples
        if "mask" in batch:
            self._tokens = self._tokens + batch["mask"].sum()  # stays on the device until it is logged
        else:
            self._tokens = self._tokens + samples * _tokens_per_image(pl_module)
        # Short epochs may never reach log_every_n_steps: the last batch of an epoch reports as well.
        reports = (batch_idx + 1) % trainer.log_every_n_steps == 0 or trainer.is_last_batch
        if reports and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        self._seconds += now - (self._last if self._last is not None else now)
        self._last = now
        if self._seconds > 0 and reports:
            factor = trainer.world_size / self._seconds
            rates = {"performance/samples_per_second": self._samples * factor}
            if tokens := int(self._tokens):
                rates["performance/tokens_per_second"] = tokens * factor
            if pl_module.device.type == "cuda":
                rates["performance/peak_memory_mib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**20
            for logger in trainer.loggers:
                logger.log_metrics(rates, step=trainer.global_step)
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in rates.items()})
            self._reset()
            self._last = now


def _tokens_per_image(pl_module: LightningModule) -> int:
    """Length of the sequence that an image becomes; 0 where the network does not say."""
    positions = getattr(getattr(getattr(pl_module, "net", None), "embedding", None), "positions", None)
    return int(getattr(positions, "max_length", 0))
