"""What happens when a loss or a gradient is no longer a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from bimamba.callbacks.exact_resume import random_states, set_random_states
from bimamba.callbacks.finders import scale_rates
from bimamba.nonfinite import Finding, as_it_stands, trace

KEY = "nonfinite"
ACTIONS = ("stop", "skip", "lower")


class NumericalHealth(Callback):
    """On the first NaN or infinity in loss or gradients: what made it, everything to replay it, and an end or a way on.

    Looked for before each optimizer step, while the weights are still good: the batch is run once more with a look at
    every module, and step, module and tensor are named. `nonfinite/step_<n>.ckpt` holds weights, optimizer, batch and
    random states; `python -m bimamba.replay <file>` repeats the step. Then, by `action`, the training ends, or leaves
    the step out, or leaves it out and lowers the learning rates.

    Cost: one fused maximum over the gradients, and one number read from the device per checked step. Whoever wants to
    stop before the weights change cannot do without that one read: the processor waits until the backward pass is over.
    With `every_n_steps=k` steps between are not looked at, nor waited for; what goes wrong there is found up to k - 1
    steps later, in weights that may have been spoilt.

    With `precision=16-mixed` infinite gradients are how the loss scale is found, and left to it: the loss alone counts.

    Args:
        folder: where the file goes.
        action: `stop`, `skip` or `lower`.
        factor: for `lower`: of all learning rates.
        max_skips: so many steps in a row may be left out; the next one stops the training.
        max_saved: files that are written at most.
        every_n_steps: how often is looked.

    Raises:
        ValueError: an unknown action or a number out of range.
        FloatingPointError: (in training) what was found, where the file is and how to replay it.
    """

    def __init__(
        self,
        folder: str,
        action: str = "stop",
        factor: float = 0.5,
        max_skips: int = 10,
        max_saved: int = 3,
        every_n_steps: int = 1,
    ) -> None:
        if action not in ACTIONS:
            raise ValueError(f"callbacks.health.action: expected one of {', '.join(ACTIONS)}, got {action!r}")
        if not 0 < factor < 1 or max_skips < 0 or max_saved < 0 or every_n_steps < 1:
            raise ValueError(
                "callbacks.health: expected 0 < factor < 1, max_skips and max_saved of at least 0, every_n_steps of at "
                f"least 1, got {factor}, {max_skips}, {max_saved}, {every_n_steps}"
            )
        self.folder, self.action, self.factor = Path(folder), action, factor
        self.max_skips, self.max_saved, self.every_n_steps = max_skips, max_saved, every_n_steps
        self._window: list[tuple[Any, int, dict[str, Any]]] = []  # the batches of this step, with their random states
        self._losses: list[torch.Tensor] = []
        self._in_a_row, self._found = 0, 0
        self._to_save: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._due(trainer):
            self._window.append((batch, batch_idx, random_states(pl_module.device)))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if self._due(trainer):
            self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        window, losses, self._window, self._losses = self._window, self._losses, [], []
        if not losses:
            return
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # FSDP's plugin is no MixedPrecision
        fine = all_finite(losses + [p.grad for p in pl_module.parameters() if p.grad is not None and not scaled])
        if trainer.world_size > 1:
            fine = trainer.strategy.reduce_boolean_decision(fine, all=True)
        if fine:
            self._in_a_row = 0
            return
        self._found += 1
        self._in_a_row += 1
        message = self._report(trainer, pl_module, window, losses)
        if self.action == "stop" or self._in_a_row > self.max_skips:
            ending = "" if self.action == "stop" else f"\nThe last {self.max_skips} steps were left out already."
            raise FloatingPointError(message + ending)
        if not scaled:  # a loss scaler leaves the step out by itself
            for parameter in pl_module.parameters():
                parameter.grad = None  # optimizers pass over what has no gradient
        then = "The step is left out"
        if self.action == "lower":
            scale_rates(trainer, self.factor)
            then += f", and the learning rate multiplied by {self.factor:g}"
        rank_zero_warn(f"{message}\n{then}.")

    def _due(self, trainer: Trainer) -> bool:
        return (trainer.global_step + 1) % self.every_n_steps == 0

    def _report(
        self, trainer: Trainer, pl_module: LightningModule, window: list[Any], losses: list[torch.Tensor]
    ) -> str:
        finding, batch, index, states = _culprit(trainer, pl_module, window, losses)
        step = trainer.global_step
        found = str(finding) if finding else "a gradient, which was finite when the batch was run once more"
        message = f"not finite at step {step} (epoch {trainer.current_epoch}, batch {index}): {found}."
        if self._found > self.max_saved or trainer.fast_dev_run:
            return message
        path = self.folder / f"step_{step}.ckpt"
        self._to_save = {"batch": _on_cpu(batch), "random": states, "step": step, "found": found}
        try:
            trainer.save_checkpoint(path)  # of all processes together
        except OSError as error:  # a full disk does not hide what was found
            raise FloatingPointError(f"{message}\nIt cannot be replayed: {error}") from error
        self._to_save = None
        return f"{message}\nSaved {path}. Replay with:  python -m bimamba.replay {path}"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._to_save is not None:
            checkpoint[KEY] = self._to_save


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity; reads one number from the device."""
    largest = torch._foreach_norm(tensors, float("inf"))  # the 2-norm of large gradients would overflow by itself
    return bool(torch.isfinite(torch.stack([n.float() for n in largest]).sum()))


def _culprit(
    trainer: Trainer, pl_module: LightningModule, window: list[Any], losses: list[torch.Tensor]
) -> tuple[Finding | None, Any, int, dict[str, Any]]:
    """The first batch of this step that is not finite on its own, on the first process that has one."""
    now = random_states(pl_module.device)
    finding, chosen = None, window[-1]
    sharded = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
    if sharded:  # a module of a sharded network does not run alone: what can be seen as it stands
        finding, number = as_it_stands(pl_module, window, losses)
        chosen = window[number]
    for entry in () if sharded else window:
        set_random_states(entry[2], pl_module.device)
        finding, _ = trace(pl_module, entry[0], trainer.precision_plugin.forward_context)
        if finding:
            chosen = entry
            break
    set_random_states(now, pl_module.device)
    mine = (finding, _on_cpu(chosen[0]), chosen[1], chosen[2])
    if trainer.world_size == 1:
        return mine
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, mine)
    found = [e for e in everyone if e[0]]
    # Shards' gradients hold what any process did: inputs and losses say which one.
    return min(found, key=lambda e: e[0].tensor.startswith("gradient"), default=everyone[0])


def _on_cpu(batch: Any) -> Any:
    return {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
