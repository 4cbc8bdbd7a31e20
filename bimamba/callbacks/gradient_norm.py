"""The gradient's size, before clipping, and how far a step moves the weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.optim import Optimizer


class GradientNorm(Callback):
    """Logs `train/grad_norm`, the 2-norm over all gradients before clipping, at the steps that are logged anyway.

    One fused norm per logged step: not measurable beside the step itself.

    Args:
        update_ratio: also log `train/update_ratio`, the 2-norm of a step over that of the weights; about 1e-3 is usual,
            far below it learns slowly, far above it is noise. Copies the weights at the steps that are logged.
    """

    def __init__(self, update_ratio: bool = False) -> None:
        self.update_ratio = update_ratio
        self._before: list[Tensor] | None = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps:
            return
        gradients = [p.grad.detach() for p in pl_module.parameters() if p.grad is not None]
        if not gradients and not isinstance(trainer.strategy, FSDPStrategy):  # a shard may hold none: others wait
            return
        if self.update_ratio:
            self._before = [p.detach().clone() for p in _trained(pl_module)]
        pl_module.log("train/grad_norm", _norm(trainer, gradients), on_step=True, on_epoch=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._before = self._before, None
        if before is None:
            return
        moved = list(torch._foreach_sub([p.detach() for p in _trained(pl_module)], before)) if before else []
        ratio = _norm(trainer, moved) / _norm(trainer, before)
        pl_module.log("train/update_ratio", ratio, on_step=True, on_epoch=False)


def _trained(module: LightningModule) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad and p.numel()]


def _norm(trainer: Trainer, tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors) if tensors else [torch.zeros((), device=trainer.strategy.root_device)]
    squared = torch.stack(norms).float().square().sum()
    if isinstance(trainer.strategy, FSDPStrategy):  # every process holds a shard
        squared = trainer.strategy.reduce(squared, reduce_op="sum")
    return squared.sqrt()
