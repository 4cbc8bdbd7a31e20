"""What every task shares: the network, its steps and epochs, its optimizer and schedule, and what is saved of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric

import bimamba
from bimamba.optim import hidden_names, parameter_groups, undecayed_names
from bimamba.packing import Packing
from bimamba.spec import DataSpec
from bimamba.tasks.compilation import GRAPH_MODES, compile_network
from bimamba.tasks.metrics import LossMean

if TYPE_CHECKING:
    from bimamba.tasks.distillation import Distillation

Batch = dict[str, Any]
UNSCALES = "_step_supports_amp_scaling"  # what torch says of a fused optimizer, and Lightning reads
SHOWN = ("loss", "accuracy", "r2")  # of a validation, on the progress bar


def run_network(net: nn.Module, batch: Batch) -> Tensor:
    """A network's outputs for a batch of the data room, padded or packed."""
    packing = [batch[name] for name in Packing._fields] if "seq_idx" in batch else []
    return net(batch["inputs"], batch.get("mask"), *packing)


class Task(LightningModule):
    """Base of the tasks, which add `shared_step` and `finish`.

    Logs `train/loss_step`, the epoch's mean `train/loss`, and under `val/…` and `test/…` what `finish` returns.

    Args:
        net: the network.
        spec: what the data are; saved in every checkpoint.
        optimizer: partial of an optimizer class; gets parameter groups with and without decay (see `bimamba.optim`).
        scheduler: partial of a schedule, `scheduler(optimizer, total_steps=…)` or, without such an argument,
            `scheduler(optimizer)`; stepped once per optimizer step, or a list of Lightning's scheduler dicts. None: the
            rate never changes.
        layer_decay, lr_scale: see `optim.parameter_groups`.
        compile: compile the network with `torch.compile` for training and evaluation.
        compile_options: `mode`, `dynamic` and `backend` of `compilation.compile_network`.
        checkpoint_extras: plain containers to be saved in every checkpoint (train.py: the configuration).
    """

    _followed = False  # whether this epoch's metrics are logged
    distillation: Distillation | None = None  # teachers, of tasks that can learn from some

    def __init__(
        self,
        net: nn.Module,
        spec: DataSpec,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any] | None = None,
        compile: bool = False,
        compile_options: Mapping[str, Any] | None = None,
        checkpoint_extras: dict[str, Any] | None = None,
        layer_decay: float | None = None,
        lr_scale: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.spec = spec
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.layer_decay, self.lr_scale = layer_decay, lr_scale
        self.checkpoint_extras = checkpoint_extras or {}
        self.undecayed, self.hidden = undecayed_names(self), hidden_names(self)
        self.train_loss = LossMean()
        self.confusion: dict[str, Tensor] = {}  # finished confusion matrices by stage, for plots
        self.predict_metrics: dict[str, float] = {}  # Lightning logs nothing while predicting
        self.graphs = False
        if compile:
            compile_network(self.net, **(compile_options or {}))
            self.graphs = (compile_options or {}).get("mode") in GRAPH_MODES

    def expect_no_graphs(self, needed_by: str) -> None:
        """For what CUDA graphs cannot bear.

        Raises:
            ValueError: the network is recorded as one.
        """
        if self.graphs and self.trainer.strategy.root_device.type == "cuda":
            raise ValueError(
                f"task.compile_options.mode: expected null or max-autotune-no-cudagraphs with {needed_by}: a CUDA "
                "graph's results lie where the next pass writes its own"
            )

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.accumulate_grad_batches > 1:  # the gradients of the first batch
            self.expect_no_graphs(f"trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches}")

    # ------------------------------------------------------------------------------------------- what a task adds

    def shared_step(self, batch: Batch, stage: str) -> dict[str, Any]:
        """One batch of any stage, and the update of that stage's metrics; `loss` is among the results in training."""
        raise NotImplementedError

    def finish(self, stage: str) -> dict[str, Tensor]:
        """A stage's metrics over the epoch and all processes, under their full names; resets them."""
        raise NotImplementedError

    def train_metrics(self) -> dict[str, Metric]:
        """What is followed over the batches of a training epoch."""
        return {"train/loss": self.train_loss}

    # ------------------------------------------------------------------------------------------- steps and epochs

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, size = self.shared_step(batch, "train")["loss"], len(batch["id"])
        # Not with prog_bar, which is read from the device at each step: `callbacks.ProgressBar` shows it
        self.log("train/loss_step", loss, on_step=True, on_epoch=False, batch_size=size)
        if not self._followed:  # Lightning keeps them; at every step that took 0.7 of 1.25 ms of the host
            for name, metric in self.train_metrics().items():
                self.log(name, metric, on_step=False, on_epoch=True, batch_size=size)
            self._followed = True
        return loss

    def on_train_epoch_start(self) -> None:
        self._followed = False

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        return self.shared_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        return self.shared_step(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        return self.shared_step(batch, "predict")

    def on_validation_epoch_end(self) -> None:
        # Every process holds the same values: syncing them again changes nothing.
        values: dict[str, Any] = self.finish("val")
        self._step_plateaus(values)
        shown = {name: values.pop(name) for name in (f"val/{s}" for s in SHOWN) if name in values}
        self.log_dict(shown, sync_dist=True, prog_bar=True)
        self.log_dict(values, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        values: dict[str, Any] = self.finish("test")
        self.log_dict(values, sync_dist=True)

    # ------------------------------------------------------------------------------------------------ optimisation

    def configure_optimizers(self) -> Any:
        options = self.optimizer.keywords if isinstance(self.optimizer, partial) else {}
        kind = self.optimizer.func if isinstance(self.optimizer, partial) else self.optimizer
        decay, rate = options.get("weight_decay", _default(kind, "weight_decay", 0.0)), options.get("lr")
        hidden = self.hidden if getattr(kind, "asks_for_hidden", False) else None
        if hidden and isinstance(self.trainer.strategy, FSDPStrategy):
            raise ValueError(
                "task.optimizer: Muon needs whole matrices, and trainer=fsdp cuts them; expected trainer=ddp, or "
                "task/optimizer=adamw"
            )
        groups = parameter_groups(self, decay, self.undecayed, self.layer_decay, rate, self.lr_scale, hidden)
        optimizer = self.optimizer(groups, **self._fused())
        if self._scaler() is None and getattr(optimizer, UNSCALES, False):
            setattr(optimizer, UNSCALES, False)  # nothing is scaled, and Lightning would refuse to clip
        if self.scheduler is None:
            return optimizer
        if "total_steps" in inspect.signature(self.scheduler).parameters:
            steps = self.trainer.estimated_stepping_batches
            # Lightning says -1 for a stream of unknown length without max_steps.
            scheduler = self.scheduler(optimizer, total_steps=steps if steps > 0 else float("inf"))
        else:
            scheduler = self.scheduler(optimizer)
        if isinstance(scheduler, list):
            return [optimizer], scheduler
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "train/lr"},
        }

    def _step_plateaus(self, values: Mapping[str, Any]) -> None:
        """Schedules that follow a metric of the validation behind an epoch's last batch, before a checkpoint is saved.

        Lightning (2.6) steps them after the epoch's checkpoints, not at all in a resumed epoch (a resumed training
        would be a step behind), and also in epochs without a validation, by its last metric or an error.
        """
        fitting = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if not (fitting and self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch):
            return
        for config in self.trainer.lr_scheduler_configs:
            scheduler, monitor = config.scheduler, str(config.monitor)
            if isinstance(scheduler, ReduceLROnPlateau) and not config.reduce_on_plateau:
                if monitor not in values:
                    raise ValueError(f"task.scheduler.monitor: expected one of {', '.join(values)}, got {monitor}")
                scheduler.step(values[monitor])

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if metric is not None or not isinstance(scheduler, ReduceLROnPlateau):  # else it is `_step_plateaus`' to step
            super().lr_scheduler_step(scheduler, metric)

    def _fused(self) -> dict[str, bool]:
        """`fused=True` for an optimizer that has such a form, on a GPU, where nobody chose another: one launch for all
        parameters, and a third of the host's time (AdamW of 96 tensors: 0.8 instead of 2.7 ms)."""
        if not isinstance(self.optimizer, partial) or self.trainer.strategy.root_device.type != "cuda":
            return {}
        chosen = {"fused", "foreach", "capturable", "differentiable"} & self.optimizer.keywords.keys()
        has_form = "fused" in inspect.signature(self.optimizer.func).parameters
        return {"fused": True} if has_form and not chosen and self._scaler() is None else {}

    def _scaler(self) -> Any:
        """That of 16-mixed: a fused optimizer unscales gradients by itself, after they should have been clipped."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning does it, and the norm over all shards where every process holds a shard."""
        sharded = isinstance(self.trainer.strategy, FSDPStrategy)
        if sharded and gradient_clip_val and gradient_clip_algorithm == "norm":
            self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)  # type: ignore[union-attr, operator]
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # ------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["spec"] = self.spec.to_dict()
        checkpoint["bimamba_version"] = bimamba.__version__
        checkpoint.update(self.checkpoint_extras)


def _default(function: Callable[..., Any], name: str, otherwise: Any) -> Any:
    """That of a parameter, if it has one."""
    parameter = inspect.signature(function).parameters.get(name)
    return otherwise if parameter is None or parameter.default is parameter.empty else parameter.default
