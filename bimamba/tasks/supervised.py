"""Classification and regression: a network, its loss and its metrics; one shared step for every stage."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric

from bimamba.packing import Packing
from bimamba.spec import DataSpec
from bimamba.strands import complements_for, other_strand
from bimamba.tasks.base import Batch, Task, run_network
from bimamba.tasks.distillation import Distillation
from bimamba.tasks.losses import SampleLoss, Weights, probabilities
from bimamba.tasks.metrics import LossMean, make_confusion_matrix, make_metrics, make_train_metric, metric_inputs


class SupervisedTask(Task):
    """Classification (multiclass, binary, multilabel) or regression, as the spec says.

    Logs `train/loss` (epoch mean), `train/loss_step`, `train/accuracy`, and under `val/…`, `test/…` the loss and every
    metric of `metrics.make_metrics`, computed over the whole epoch and all processes, never averaged over batches.
    With teachers `train/loss` is the weighted sum of both losses, and `train/loss_distill` the mean of theirs.

    Args:
        net: `net(inputs, mask) -> logits (b, spec.num_outputs)`; packed: `net(inputs, mask, seq_idx, bounds, order)`.
        spec: what the data are; saved in every checkpoint.
        optimizer: partial of an optimizer class; gets parameter groups with and without decay (see `bimamba.optim`).
        scheduler: partial of a schedule, `scheduler(optimizer, total_steps=…)` or, without such an argument,
            `scheduler(optimizer)`; stepped once per optimizer step. None: the rate never changes.
        label_smoothing, class_weights, pos_weight: see `losses.SampleLoss`. `"balanced"` reads the training split.
        calibration_bins, thresholds: see `metrics.make_metrics`.
        layer_decay, lr_scale: see `optim.parameter_groups`.
        test_time_rc: in test and prediction (not in validation) read DNA on both strands, in twice the time, and take
            the mean of the logits, or of a regression's values. Of the logits, not of the probabilities: loss, metrics
            and calibration then belong to one output, and it is exactly what the same weights give with
            `model.rc_equivariant=true`, whose head is linear.
        test_time_flip: the same of images, as they are and mirrored left to right; where a mirror image is as likely.
        distill: partial of `Distillation`, which gets spec and compile_options: trained networks to learn from beside
            the labels, in training alone; losses and metrics of evaluations are those of the labels.
        compile, compile_options: see `Task`.
        checkpoint_extras: plain containers to be saved in every checkpoint (train.py: the configuration).

    Raises:
        ValueError: an option that the problem does not have.
    """

    # ModuleDicts of metrics; torch knows their values as plain modules
    epoch_metrics: Any
    epoch_losses: Any
    epoch_confusion: Any

    def __init__(
        self,
        net: nn.Module,
        spec: DataSpec,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any] | None = None,
        label_smoothing: float = 0.0,
        class_weights: Weights | str | None = None,
        pos_weight: Weights | float | str | None = None,
        calibration_bins: int = 15,
        thresholds: int | None = None,
        compile: bool = False,
        compile_options: Mapping[str, Any] | None = None,
        checkpoint_extras: dict[str, Any] | None = None,
        layer_decay: float | None = None,
        lr_scale: Mapping[str, float] | None = None,
        test_time_rc: bool = False,
        test_time_flip: bool = False,
        distill: Callable[..., Distillation] | None = None,
    ) -> None:
        super().__init__(
            net, spec, optimizer, scheduler, compile, compile_options, checkpoint_extras, layer_decay, lr_scale
        )
        self.loss = SampleLoss(spec, label_smoothing, class_weights, pos_weight)

        self.test_time_rc, self.test_time_flip = test_time_rc, test_time_flip
        self.complement: Tensor
        if test_time_rc:
            self.register_buffer("complement", _complement(net, spec), persistent=False)
        if test_time_flip and spec.kind != "image":
            raise ValueError(f"task.test_time_flip: expected images, got data of kind {spec.kind!r}")
        if distill is not None:
            made = distill(spec, compile_options=(compile_options or {}) if compile else None)
            self.distillation = made if made.teachers else None
        if self.distillation is not None:
            self.distill_loss = LossMean()
        self.train_accuracy = make_train_metric(spec)
        evaluated = ("val", "test", "predict")
        metrics = {s: make_metrics(spec, f"{s}/", calibration_bins, thresholds) for s in evaluated}
        self.epoch_metrics = nn.ModuleDict(metrics)
        self.epoch_losses = nn.ModuleDict({s: MeanMetric() for s in evaluated})
        confusion = make_confusion_matrix(spec)
        self.epoch_confusion = nn.ModuleDict({s: confusion.clone() for s in evaluated} if confusion else {})

    # ---------------------------------------------------------------------------------------------- the shared step

    def forward(self, batch: Batch) -> Tensor:
        """A batch of the data room to logits `(b, num_outputs)`."""
        return run_network(self.net, batch)

    def logits_of_both_views(self, batch: Batch) -> Tensor:
        """Mean of a batch's logits and those of its reverse complements or mirror images, `(b, num_outputs)`."""
        if self.test_time_flip:
            other = batch["inputs"].flip(-1)
        else:
            packing = Packing(*(batch[name] for name in Packing._fields)) if "seq_idx" in batch else None
            other = other_strand(batch["inputs"], self.complement, batch.get("mask"), packing)
        here = self(batch).clone()  # a CUDA graph's output lies where the next call's will
        return (here + self({**batch, "inputs": other})) / 2

    def shared_step(self, batch: Batch, stage: str) -> dict[str, Any]:
        """Logits, loss and probabilities of a batch, and the update of the stage's metrics.

        Returns:
            `probabilities`, float32 as of `losses.probabilities`; `id`; and, for labelled rows, `label` and
            `sample_loss (b)`; in training also `loss`.
        """
        distillation = self.distillation if stage == "train" else None
        # Before the student's own pass, between which and its backward pass no other network runs
        target = distillation.target(batch) if distillation else None
        both = (self.test_time_rc or self.test_time_flip) and stage in ("test", "predict")
        logits = self.logits_of_both_views(batch) if both else self(batch)
        label = batch.get("label")
        out: dict[str, Any] = {"id": batch.get("id")}
        if stage != "train":
            out["probabilities"] = probabilities(self.spec, logits.detach())
        if label is None:
            return out
        sample_loss = self.loss(logits, label)
        if distillation and target is not None:
            distance = distillation.loss(logits, target)
            self.distill_loss.update(distance.detach())
            sample_loss = sample_loss.lerp(distance.to(sample_loss), distillation.weight)
        out |= {"label": label, "sample_loss": sample_loss.detach()}
        if stage == "train":
            out["loss"] = sample_loss.mean()
            self.train_loss.update(out["sample_loss"])
            if self.train_accuracy is not None:
                self.train_accuracy.update(
                    *metric_inputs(self.spec.problem, probabilities(self.spec, logits.detach()), label)
                )
            return out
        inputs = metric_inputs(self.spec.problem, out["probabilities"], label)
        self.epoch_losses[stage].update(out["sample_loss"])
        self.epoch_metrics[stage].update(*inputs)
        if stage in self.epoch_confusion:
            self.epoch_confusion[stage].update(*inputs)
        return out

    def train_metrics(self) -> dict[str, Metric]:
        accuracy = {} if self.train_accuracy is None else {"train/accuracy": self.train_accuracy}
        distance = {} if self.distillation is None else {"train/loss_distill": self.distill_loss}
        return super().train_metrics() | accuracy | distance

    # --------------------------------------------------------------------------------------------- ends of epochs

    def on_predict_epoch_end(self) -> None:
        labelled = self.epoch_losses["predict"].update_called
        self.predict_metrics = {k: float(v) for k, v in self.finish("predict").items()} if labelled else {}

    def finish(self, stage: str) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            if self.trainer.sanity_checking:  # a few batches rarely hold every class
                warnings.simplefilter("ignore")
            values = {f"{stage}/loss": self.epoch_losses[stage].compute()}
            values |= {k: v.float().mean() for k, v in self.epoch_metrics[stage].compute().items()}
        self.epoch_losses[stage].reset()
        self.epoch_metrics[stage].reset()
        if stage in self.epoch_confusion:
            self.confusion[stage] = self.epoch_confusion[stage].compute().cpu()
            self.epoch_confusion[stage].reset()
        return values

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.distillation is not None:
            self.distillation.place(self.trainer.precision_plugin, self.trainer.strategy.root_device)
        if stage == "fit" and self.loss.balanced:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            if not hasattr(data, "class_counts"):
                raise ValueError("'balanced' weights need a data module with `class_counts`; give numbers instead")
            self.loss.balance(data.class_counts.tolist(), data.sizes["train"])


def _complement(net: nn.Module, spec: DataSpec) -> Tensor:
    """Complements of token ids, int64, where reading both strands is possible and changes anything."""
    if getattr(net, "rc_equivariant", False):
        raise ValueError(
            "task.test_time_rc: expected false with model.rc_equivariant=true, which reads both strands anyway"
        )
    return complements_for("task.test_time_rc", spec)
