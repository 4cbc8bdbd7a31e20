"""Parameter groups for AdamW, and step-wise learning-rate schedules: warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_ENDLESS = "set trainer.max_epochs (with a data set of known length) or trainer.max_steps"


def undecayed_names(module: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone.

    These have at most one dimension (biases, norm scales, and with them `A_log`, `D` and `dt_bias` of shape `(h)`), or
    were marked by their layer with `param._no_weight_decay = True` (the same three in other shapes, positions, class
    tokens). Decay would pull `A_log` and `dt_bias` to 0, which is to say every head towards one and the same memory
    length, whatever the data want.

    Ask before the module is sharded: FSDP shows every parameter as flat.
    """
    return {n for n, p in module.named_parameters() if p.ndim <= 1 or getattr(p, "_no_weight_decay", False)}


def parameter_groups(module: nn.Module, weight_decay: float, undecayed: set[str] | None = None) -> list[dict[str, Any]]:
    """The optimizer groups `decay` and `no_decay` of a module's trainable parameters; shared parameters come once.

    Args:
        module: whose parameters are meant.
        weight_decay: of the first group; the second has 0.
        undecayed: names for the second group, by default `undecayed_names(module)`.
    """
    undecayed = undecayed_names(module) if undecayed is None else undecayed
    decay, no_decay = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = name.replace("_fsdp_wrapped_module.", "") in undecayed
            (no_decay if plain else decay).append(parameter)
    groups = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def warmup_steps(warmup: int | float, total_steps: float) -> int:
    """Number of warm-up steps: an int counts steps, a float in [0, 1) is a fraction of all steps.

    Raises:
        ValueError: negative, a float of 1 or more, a fraction of an endless training, or at least as many steps as the
            whole training has.
    """
    if warmup < 0 or (isinstance(warmup, float) and warmup >= 1):
        raise ValueError(f"warmup: expected a number of steps (int) or a fraction in [0, 1) (float), got {warmup!r}")
    if isinstance(warmup, float) and warmup and math.isinf(total_steps):
        raise ValueError(f"warmup: {warmup} of an endless training is undefined; {_ENDLESS}")
    steps = warmup if isinstance(warmup, int) else round(warmup * total_steps)
    if steps and steps >= total_steps:
        raise ValueError(f"warmup: {steps} steps of warm-up leave nothing of a training of {total_steps} steps")
    return steps


def _schedule(
    optimizer: Optimizer,
    total_steps: float,
    warmup: int | float,
    final_ratio: float,
    decay: Callable[[float], float],
) -> LambdaLR:
    """Linear warm-up to the base rate, then `decay(progress)` from 1 to 0, mapped to [final_ratio, 1]."""
    if not 0 <= final_ratio <= 1:
        raise ValueError(f"final_ratio: expected last rate over base rate, in [0, 1], got {final_ratio}")
    if final_ratio < 1 and math.isinf(total_steps):
        raise ValueError(f"a decaying schedule needs the number of training steps; {_ENDLESS}")
    first = warmup_steps(warmup, total_steps)

    def factor(step: int) -> float:
        if step < first:
            return (step + 1) / (first + 1)  # the first step already learns; step `first` has the full rate
        # The last optimizer step is number total_steps - 1; whoever trains on stays at the final rate.
        progress = min((step - first) / max(total_steps - 1 - first, 1), 1.0)
        return final_ratio + (1 - final_ratio) * decay(progress)

    return LambdaLR(optimizer, factor)


def cosine(optimizer: Optimizer, total_steps: float, warmup: int | float = 0, final_ratio: float = 0.0) -> LambdaLR:
    """Warm-up, then half a cosine down to `final_ratio` of the base rate (Loshchilov & Hutter 2017, no restarts).

    Args:
        optimizer: whose rates are scheduled.
        total_steps: optimizer steps of the whole training; infinity where that is unknown.
        warmup: steps (int) or fraction of all steps (float below 1) of linear warm-up.
        final_ratio: last rate divided by the base rate.

    Raises:
        ValueError: a warm-up or ratio outside its range; an endless training.
    """
    return _schedule(optimizer, total_steps, warmup, final_ratio, lambda t: 0.5 * (1 + math.cos(math.pi * t)))


def linear(optimizer: Optimizer, total_steps: float, warmup: int | float = 0, final_ratio: float = 0.0) -> LambdaLR:
    """Warm-up, then a straight line down to `final_ratio` of the base rate. Arguments as of `cosine`."""
    return _schedule(optimizer, total_steps, warmup, final_ratio, lambda t: 1 - t)


def constant(optimizer: Optimizer, total_steps: float, warmup: int | float = 0) -> LambdaLR:
    """Warm-up, then the base rate to the end. Arguments as of `cosine`."""
    return _schedule(optimizer, total_steps, warmup, 1.0, lambda t: 1.0)
