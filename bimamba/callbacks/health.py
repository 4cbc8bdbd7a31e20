"""What happens when a loss or a gradient is no longer a number."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from bimamba.callbacks.checkpoints import validation_follows
from bimamba.callbacks.exact_resume import random_states, set_random_states
from bimamba.callbacks.finders import scale_rates
from bimamba.nonfinite import Finding, as_it_stands, trace
from bimamba.strategies import is_sharded

KEY = "nonfinite"
ACTIONS = ("stop", "skip", "lower")


class _Step(NamedTuple):
    """An optimizer step that was looked at: its batches with their random states, its losses, of its gradients the
    parameters' numbers and the largest values, and the answer, which is there when `ready` is reached."""

    number: int
    epoch: int
    window: list[tuple[Any, int, dict[str, Any]]]
    losses: list[torch.Tensor]
    numbers: list[int]
    largest: torch.Tensor
    finite: torch.Tensor
    ready: torch.cuda.Event | None

    def arrived(self) -> bool:
        """The answer, which is waited for."""
        if self.ready is not None:
            self.ready.synchronize()
        return bool(self.finite)


class NumericalHealth(Callback):
    """On the first NaN or infinity in loss or gradients: what made it, everything to replay it, and an end or a way on.

    Looked for before each optimizer step, while the weights are still good: the batch is run once more with a look at
    every module, and step, module and tensor are named. `nonfinite/step_<n>.ckpt` holds weights, optimizer, batch and
    random states; `python -m bimamba.replay <file>` repeats the step. Then, by `action`, the training ends, or leaves
    the step out, or leaves it out and lowers the learning rates.

    Cost: one fused maximum over the gradients of each checked step, and its answer. A fused Adam or AdamW (the default
    on a GPU) leaves a step out by itself, on the device, and the host reads the answer when it is one step further: it
    does not wait, and the report comes a step late, from weights that did not change. The step's batches stay on the
    device until then, and in the file the counters of steps, batches and schedule are those of the next one. Other
    optimizers have to be kept from the step: the host waits until the backward pass is over. With `every_n_steps=k`
    steps between are not looked at; what goes wrong there is found up to k - 1 steps later, in weights that may have
    been spoilt.

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
        self._unsettled: _Step | None = None  # looked at by the device, its answer not yet read
        self._optimizer: Optimizer | None = None  # which knows the answer
        self._in_a_row, self._found = 0, 0
        self._to_save: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._window, self._losses, self._unsettled = [], [], None  # of a training that was interrupted

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._due(trainer):
            self._window.append((batch, batch_idx, random_states(pl_module.device)))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if self._due(trainer):
            self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._settle(trainer, pl_module)
        window, losses, self._window, self._losses = self._window, self._losses, [], []
        if not losses:
            return
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # FSDP's plugin is no MixedPrecision
        found = [(i, p.grad) for i, p in enumerate(pl_module.parameters()) if p.grad is not None and not scaled]
        largest = largest_values(losses + [gradient for _, gradient in found])
        finite = torch.isfinite(largest.sum())
        if trainer.world_size > 1:
            finite = finite.int()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        looked_at = losses, [i for i, _ in found], largest[len(losses) :]
        step = _Step(trainer.global_step, trainer.current_epoch, window, *looked_at, *_sent(finite.bool()))
        if scaled or not _leaves_out(optimizer):
            if not self._answered(trainer, pl_module, step) and not scaled:  # a loss scaler leaves it out by itself
                for parameter in pl_module.parameters():
                    parameter.grad = None  # optimizers pass over what has no gradient
            return
        optimizer.found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]  # torch's name: 1 leaves the step out
        self._optimizer, self._unsettled = optimizer, step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._optimizer is not None:
            del self._optimizer.found_inf  # type: ignore[attr-defined]  # of this step alone
            self._optimizer = None
        if validation_follows(trainer):  # in whose mode nobody could say what a step of the training did
            self._settle(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        step, self._unsettled = self._unsettled, None
        with suppress(RuntimeError):  # of a device that does not answer any more
            if step is not None and not step.arrived():
                rank_zero_warn(f"not finite at step {step.number} (epoch {step.epoch}), the last one. It is left out.")

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The answer of the step before, which the optimizer has already followed."""
        step, self._unsettled = self._unsettled, None
        if step is not None:
            self._answered(trainer, pl_module, step)

    def _answered(self, trainer: Trainer, pl_module: LightningModule, step: _Step) -> bool:
        """Whether all was finite in a step; what follows where it was not."""
        if step.arrived():
            self._in_a_row = 0
            return True
        self._found += 1
        self._in_a_row += 1
        message = self._report(trainer, pl_module, step)
        if self.action == "stop" or self._in_a_row > self.max_skips:
            ending = "" if self.action == "stop" else f"\nThe last {self.max_skips} steps were left out already."
            raise FloatingPointError(message + ending)
        then = "The step is left out"
        if self.action == "lower":
            scale_rates(trainer, self.factor)
            then += f", and the learning rate multiplied by {self.factor:g}"
        rank_zero_warn(f"{message}\n{then}.")
        return False

    def _due(self, trainer: Trainer) -> bool:
        return (trainer.global_step + 1) % self.every_n_steps == 0

    def _report(self, trainer: Trainer, pl_module: LightningModule, step: _Step) -> str:
        finding, batch, index, states = _culprit(trainer, pl_module, step)
        found = str(finding) if finding else "a gradient, which was finite when the batch was run once more"
        message = f"not finite at step {step.number} (epoch {step.epoch}, batch {index}): {found}."
        if self._found > self.max_saved or trainer.fast_dev_run:
            return message
        path = self.folder / f"step_{step.number}.ckpt"
        self._to_save = {"batch": _on_cpu(batch), "random": states, "step": step.number, "found": found}
        try:
            trainer.save_checkpoint(path)  # of all processes together
        except OSError as error:  # a full disk does not hide what was found
            raise FloatingPointError(f"{message}\nIt cannot be replayed: {error}") from error
        self._to_save = None
        return f"{message}\nSaved {path}. Replay with:  python -m bimamba.replay {path}"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._to_save is not None:
            checkpoint[KEY] = self._to_save
        elif trainer.state.fn == "fit":
            self._settle(trainer, pl_module)  # no checkpoint of a training that has to stop


def largest_values(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Of each tensor the largest absolute value, NaN where it holds one: float32 `(len(tensors))`, on their device.
    Their sum is finite where all of them are: the 2-norm of large gradients would overflow by itself."""
    return torch.stack([n.float() for n in torch._foreach_norm(tensors, float("inf"))])


def _sent(finite: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy for the host, and when it is there."""
    if not finite.is_cuda:
        return finite, None
    copy = torch.empty((), dtype=finite.dtype, pin_memory=True).copy_(finite, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return copy, ready


def _leaves_out(optimizer: Optimizer) -> bool:
    """Whether an optimizer leaves the step out where its `found_inf` is 1."""
    # Not by its defaults: a state that was loaded brings its own groups
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and fused


def _culprit(
    trainer: Trainer, pl_module: LightningModule, step: _Step
) -> tuple[Finding | None, Any, int, dict[str, Any]]:
    """The first batch of this step that is not finite on its own, on the first process that has one."""
    now = random_states(pl_module.device)
    finding, chosen = None, step.window[-1]
    sharded = is_sharded(trainer.strategy)
    if sharded:  # a module of a sharded network does not run alone: what can be seen as it stands
        finding, number = as_it_stands(pl_module, step.window, step.losses, step.numbers, step.largest)
        chosen = step.window[number]
    for entry in () if sharded else step.window:
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
