"""The gradient's size, before clipping."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch.optim import Optimizer


class GradientNorm(Callback):
    """Logs `train/grad_norm`, the 2-norm over all gradients before clipping, at the steps that are logged anyway.

    One fused norm per logged step: not measurable beside the step itself.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps:
            return
        gradients = [p.grad.detach() for p in pl_module.parameters() if p.grad is not None]
        if not gradients:
            return
        squared = torch.stack(torch._foreach_norm(gradients)).float().square().sum()
        if isinstance(trainer.strategy, FSDPStrategy):  # every process holds a shard
            squared = trainer.strategy.reduce(squared, reduce_op="sum")
        pl_module.log("train/grad_norm", squared.sqrt(), on_step=True, on_epoch=False)
