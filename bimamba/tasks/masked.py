"""Masked-token pretraining (Devlin et al. 2019, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from bimamba.spec import DataSpec
from bimamba.tasks.base import Batch, Task
from bimamba.tasks.losses import check_smoothing

IGNORED = -100


class MaskedTokenTask(Task):
    """Predicts hidden letters of a sequence.

    Logs `train/loss_step`, `train/loss`, and under `val/…`, `test/…` `loss` (mean negative log-likelihood of a hidden
    letter, in nats), `accuracy` and `perplexity` (its exponential), over all hidden letters of the epoch and all
    processes.

    Args:
        net: `net(inputs, mask) -> logits (b, l, letters)`, a `Classifier` with `model/pooling=tokens`.
        spec: its classes are the letters.
        optimizer, scheduler, compile, compile_options, checkpoint_extras, layer_decay, lr_scale: see `Task`.
        label_smoothing: share of the target that is spread over all letters, in training alone.

    Raises:
        ValueError: a smoothing outside [0, 1), or at the first batch a network that has no output a token.
    """

    epoch_metrics: Any  # ModuleDicts of metrics; torch knows their values as plain modules

    def __init__(
        self,
        net: nn.Module,
        spec: DataSpec,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any] | None = None,
        label_smoothing: float = 0.0,
        compile: bool = False,
        compile_options: Mapping[str, Any] | None = None,
        checkpoint_extras: dict[str, Any] | None = None,
        layer_decay: float | None = None,
        lr_scale: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(
            net, spec, optimizer, scheduler, compile, compile_options, checkpoint_extras, layer_decay, lr_scale
        )
        check_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

        def make() -> nn.ModuleDict:
            accuracy = MulticlassAccuracy(len(spec.class_names), average="micro", ignore_index=IGNORED)
            return nn.ModuleDict({"loss": MeanMetric(), "accuracy": accuracy})

        self.epoch_metrics = nn.ModuleDict({"val": make(), "test": make()})

    def forward(self, batch: Batch) -> Tensor:
        """A batch of the data room to logits `(b, l, letters)`."""
        logits = self.net(batch["inputs"], batch.get("mask"))
        if logits.dim() != 3:
            raise ValueError(
                f"a masked-token task needs an output a token, (b, l, letters), got {tuple(logits.shape)}: choose "
                "model/pooling=tokens, and data with hidden letters (data=genome)"
            )
        return logits

    def shared_step(self, batch: Batch, stage: str) -> dict[str, Any]:
        """Loss of a batch, and the update of the stage's metrics.

        Returns:
            `id`, and `loss`: the mean over the batch's hidden letters, 0 where there are none.
        """
        logits = self(batch).flatten(0, 1).float()
        label = batch["label"].flatten()
        hidden = (label != IGNORED).sum()
        smoothing = self.label_smoothing if stage == "train" else 0.0
        total = F.cross_entropy(logits, label, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
        loss = total / hidden.clamp(min=1)  # an assembly gap has nothing to predict
        if stage == "train":
            self.train_loss.update(loss.detach(), weight=hidden)
        else:
            metrics = self.epoch_metrics[stage]
            metrics["loss"].update(loss.detach(), weight=hidden)
            metrics["accuracy"].update(logits.detach(), label)
        return {"id": batch["id"], "loss": loss}

    def finish(self, stage: str) -> dict[str, Tensor]:
        metrics = self.epoch_metrics[stage]
        values = {f"{stage}/{name}": metric.compute() for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        return values | {f"{stage}/perplexity": values[f"{stage}/loss"].exp()}
