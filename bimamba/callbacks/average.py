"""An exponential moving average of the weights, evaluated and saved beside them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bimamba.strategies import is_sharded


class AverageWeights(WeightAveraging):
    """`average ← decay · average + (1 - decay) · weights` after every optimizer step (Polyak & Juditsky 1992).

    Validation, the choice of the best checkpoint and the test after the training measure the average. Checkpoints hold
    it as `state_dict` and the weights themselves as `current_model_state`, so evaluations, exports and fine-tuning take
    the average (`weights=raw` takes the others) and a resumed training goes on with both.

    Args:
        decay: in (0, 1); None: off.
        warmup: begin with a shorter memory: the decay of update n is at most (1 + n) / (10 + n). Otherwise the first
            1 / (1 - decay) steps show the initial weights more than the trained ones.
        every_n_steps: optimizer steps between two updates.

    Raises:
        ValueError: a decay out of range, or (in setup) a strategy that shards the weights.
    """

    def __init__(self, decay: float | None = None, warmup: bool = True, every_n_steps: int = 1) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"callbacks.average.decay: expected a number between 0 and 1, or null, got {decay}")
        if every_n_steps < 1:
            raise ValueError(f"callbacks.average.every_n_steps: expected at least 1, got {every_n_steps}")
        super().__init__(use_buffers=False)
        self.decay, self.warmup, self.every_n_steps = decay, warmup, every_n_steps

    @property
    def off(self) -> bool:
        """Whether there is nothing to do."""
        return self.decay is None

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and (step_idx + 1) % self.every_n_steps == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if is_sharded(trainer.strategy):
            raise ValueError("callbacks.average: weights that are sharded cannot be averaged; use trainer=ddp")
        if stage == "fit":
            assert self.decay is not None
            self._average_model = _Averaged(pl_module, self._device or pl_module.device, self.decay, self.warmup)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":  # else the average, which is there already, is what is to be measured
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass  # not yet: a checkpoint may be saved after this, which must hold both

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._copy_average_to_current(pl_module)
        self._average_model = None


class _Averaged(AveragedModel):
    """torch's, which reads its counter from the device three times an update: here nobody waits for the device."""

    def __init__(self, model: nn.Module, device: torch.device | int, decay: float, warmup: bool) -> None:
        super().__init__(model, device)  # type: ignore[arg-type]  # any device that Module.to takes
        self.n_averaged = self.n_averaged.cpu()
        self.decay, self.warmup = decay, warmup
        self._tensors: tuple[list[Tensor], ...] | None = None

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        if self._tensors is None:  # once: a walk through the modules takes milliseconds
            self._tensors = tuple(list(f()) for m in (self.module, model) for f in (m.parameters, m.buffers))
        averages, buffers, weights, current_buffers = self._tensors
        n = int(self.n_averaged)
        decay = 0.0 if n == 0 else min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        torch._foreach_lerp_(averages, weights, 1 - decay)  # one launch, not one a tensor
        for average, current in zip(buffers, current_buffers, strict=True):
            average.copy_(current)  # not averaged: ours are constants of the loss
        self.n_averaged += 1
