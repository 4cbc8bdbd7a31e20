"""Finding where a NaN or an infinity comes from: one batch once more, with a look at every module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric


class Finding(NamedTuple):
    """Where the first value that is not finite appears.

    Args:
        where: in words, with the module's name.
        module: its name in the task, or "" where no module made it.
        tensor: `parameter`, `input`, `output`, `gradient` or `loss`, with its name where it has one.
        counts: in words: shape, NaN, infinite.
    """

    where: str
    module: str
    tensor: str
    counts: str

    def __str__(self) -> str:
        return f"{self.where} ({self.counts})"


def trace(
    task: LightningModule,
    batch: dict[str, Any],
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[Finding | None, Tensor]:
    """Runs a training step on a batch and looks at parameters, inputs, every module's output, loss and gradients.

    The task is left as it was: metrics, gradients and logs. It waits for the device at every module.

    Args:
        task: its `training_step` gives the loss.
        batch: as `training_step` got it.
        context: of the forward pass (autocast).

    Returns:
        The first thing that is not finite, or None, and the loss.
    """
    if finding := _first_of(task.named_parameters(), "parameter", "the parameter {} is not finite before the step"):
        return finding, torch.full((), torch.nan)
    inputs = [(k, v) for k, v in batch.items() if isinstance(v, Tensor)]
    if finding := _first_of(inputs, "input", "the batch's {} are not finite"):
        return finding, torch.full((), torch.nan)

    found: list[Finding] = []  # in the order of the passes
    last_finite = ["the loss"]

    def look_at(name: str) -> Callable[..., None]:
        def forward(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not _finite(tensor) and not found:
                    found.append(Finding(f"the output of {name}", name, "output", _counts(tensor)))
                if tensor.requires_grad and tensor.is_floating_point():
                    tensor.register_hook(backward)

        def backward(gradient: Tensor) -> None:
            if found:
                return
            if _finite(gradient):
                last_finite[0] = name
                return
            where = f"the gradient of the output of {name}, made by the backward pass of {last_finite[0]}"
            found.append(Finding(where, last_finite[0], f"gradient of {name}", _counts(gradient)))

        return forward

    with _undisturbed(task), torch.enable_grad():
        handles = [m.register_forward_hook(look_at(name)) for name, m in task.named_modules() if _watched(name, m)]
        try:
            with context():
                loss: Any = task.training_step(batch, 0)
            if not found and not _finite(loss):
                found.append(Finding("the loss", "loss", "loss", _counts(loss)))
            if not found:
                named = [(n, p) for n, p in task.named_parameters() if p.requires_grad]
                # Not loss.backward(): DistributedDataParallel would start to reduce.
                gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
                pairs = [(n, g) for (n, _), g in zip(named, gradients, strict=True) if g is not None]
                if not found and (finding := _first_of(pairs, "gradient", "the gradient of the parameter {}")):
                    found.append(finding)
        finally:
            for handle in handles:
                handle.remove()
    return (found[0] if found else None), loss.detach()


def as_it_stands(
    task: LightningModule, batches: list[Any], losses: list[Tensor], numbers: list[int], largest: Tensor
) -> tuple[Finding | None, int]:
    """What is not finite of inputs, losses, parameters and gradients, without running anything, and in which batch.

    Args:
        task: of a sharded network, whose parameters are this process's parts.
        batches, losses: of the step.
        numbers: of the parameters that had a gradient then; those at hand may be of the next step.
        largest: absolute value of each of these gradients, `(gradients)`.
    """
    for number, ((batch, *_), loss) in enumerate(zip(batches, losses, strict=True)):
        inputs = [(k, v) for k, v in batch.items() if isinstance(v, Tensor)]
        if finding := _first_of(inputs, "input", "the batch's {} are not finite"):
            return finding, number
        if not _finite(loss):
            return Finding("the loss", "loss", "loss", _counts(loss)), number
    named = [(n.replace("_fsdp_wrapped_module.", ""), p) for n, p in task.named_parameters()]
    finding = _first_of(named, "parameter", "the parameter {}")
    for number, value in zip(numbers, largest.tolist(), strict=True) if finding is None else ():
        if not math.isfinite(value):
            name = named[number][0]
            where, what = f"the gradient of the parameter {name}", f"largest value {value}"
            return Finding(where, name.rpartition(".")[0], f"gradient {name}", what), len(batches) - 1
    return finding, len(batches) - 1


def _watched(name: str, module: nn.Module) -> bool:
    return bool(name) and not isinstance(module, Metric | nn.ModuleDict | nn.ModuleList)


def _first_of(named: Any, tensor: str, words: str) -> Finding | None:
    for name, value in named:
        if not _finite(value):
            return Finding(words.format(name), name.rpartition(".")[0], f"{tensor} {name}", _counts(value))
    return None


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def _counts(tensor: Tensor) -> str:
    value = tensor.detach()
    nan, inf = int(value.isnan().sum()), int(value.isinf().sum())
    return f"{nan} NaN and {inf} infinite of {value.numel()}, shape {tuple(value.shape)}, {value.dtype}".replace(
        "torch.", ""
    )


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [t for item in output for t in _tensors(item)] if isinstance(output, list | tuple) else []


@contextmanager
def _undisturbed(task: LightningModule) -> Iterator[None]:
    """No logs, metrics as before, and no compiled code, which knows no hooks."""
    metrics = [m for m in task.modules() if isinstance(m, Metric)]
    states = [(m._update_count, m._computed, {k: _copied(v) for k, v in m.metric_state.items()}) for m in metrics]
    compiled = {m: m._compiled_call_impl for m in task.modules() if getattr(m, "_compiled_call_impl", None) is not None}
    for module in compiled:
        module._compiled_call_impl = None
    task.log = task.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del task.log, task.log_dict
        for module, call in compiled.items():
            module._compiled_call_impl = call
        for metric, (count, computed, values) in zip(metrics, states, strict=True):
            metric._update_count, metric._computed = count, computed
            for name, value in values.items():
                setattr(metric, name, value)


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value.clone()
