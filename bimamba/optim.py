"""Parameter groups for AdamW, and learning-rate schedules: warm-up, then cosine, linear, constant or plateau."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

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


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    undecayed: set[str] | None = None,
    layer_decay: float | None = None,
    lr: float | None = None,
    lr_scale: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """The optimizer groups `decay` and `no_decay` of a module's trainable parameters; shared parameters come once.

    Args:
        module: whose parameters are meant.
        weight_decay: of the first group; the second has 0.
        undecayed: names for the second group, by default `undecayed_names(module)`.
        layer_decay: in (0, 1]: each layer's learning rate is that of the layer above times this (Clark et al. 2020,
            "ELECTRA"; Bao et al. 2022, "BEiT"), and each layer has groups of its own, `layer_0/decay` (the embedding)
            to `layer_<depth + 1>/decay` (norm, pooling, head), which has the rate `lr`. None: one rate for all.
        lr: the highest rate; needed with `layer_decay` and `lr_scale`.
        lr_scale: factors of the rate by part of the network, `{"embedding": 0.1, "head": 10}`, which then has groups of
            its own, `embedding/decay`. Of several keys that a parameter's name begins with the longest counts. None:
            one rate for all.

    Raises:
        ValueError: a layer_decay or factor out of range or without a rate, or a part that is not there.
    """
    undecayed = undecayed_names(module) if undecayed is None else undecayed
    if layer_decay is not None and (not 0 < layer_decay <= 1 or lr is None):
        raise ValueError(f"layer_decay: expected a number in (0, 1] and an optimizer with lr, got {layer_decay}, {lr}")
    named = {_plain(n): p for n, p in module.named_parameters() if p.requires_grad}
    layers = (
        dict.fromkeys(named, 0)
        if layer_decay is None
        else layer_numbers([_plain(n) for n, _ in module.named_parameters()])
    )
    parts = _parts(module, lr_scale or {})
    if parts and lr is None:
        raise ValueError("lr_scale: expected an optimizer with lr")
    top = max(layers.values(), default=0)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named.items():
        kind, layer = ("no_decay" if name in undecayed else "decay"), layers[name]
        part, factor = parts.get(name, ("", 1.0))
        key = "/".join(k for k in (part, "" if layer_decay is None else f"layer_{layer}", kind) if k)
        if key not in groups:
            groups[key] = {"name": key, "params": [], "weight_decay": weight_decay if kind == "decay" else 0.0}
            if layer_decay is not None or part:
                assert lr is not None
                groups[key]["lr"] = lr * factor * (layer_decay or 1.0) ** (top - layer)
        groups[key]["params"].append(parameter)
    return sorted(groups.values(), key=lambda g: (layers[_first(named, g)], g["name"]))


def _parts(module: nn.Module, lr_scale: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    """Key and factor of each parameter that a key of `lr_scale` names."""
    found: dict[str, tuple[str, float]] = {}
    names = [_plain(n) for n, _ in module.named_parameters()]
    for part in sorted(lr_scale, key=len):
        factor = lr_scale[part]
        of_part = [n for n in names if n.removeprefix("net.").startswith(f"{part}.")]
        if not of_part:
            there = dict.fromkeys(n.removeprefix("net.").split(".")[0] for n in names)
            raise ValueError(f"lr_scale: no parameters in {part!r}; expected one of {', '.join(there)}, or within them")
        if not factor > 0:
            raise ValueError(f"lr_scale.{part}: expected a factor above 0, got {factor}")
        found |= dict.fromkeys(of_part, (part, float(factor)))
    return found


def layer_numbers(names: Iterable[str]) -> dict[str, int]:
    """Number of the layer of each parameter: 0 the embedding, then the blocks, then all that comes after them."""
    names = list(names)
    blocks = {n: int(m.group(1)) + 1 for n in names if (m := re.search(r"(?:^|\.)blocks\.(\d+)\.", n))}
    last = max(blocks.values(), default=0) + 1
    return {n: blocks.get(n, 0 if re.search(r"(?:^|\.)embedding\.", n) else last) for n in names}


def _plain(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def _first(named: dict[str, nn.Parameter], group: dict[str, Any]) -> str:
    return next(name for name, parameter in named.items() if parameter is group["params"][0])


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


def constant(optimizer: Optimizer, total_steps: float, warmup: int | float = 0, final_ratio: float = 1.0) -> LambdaLR:
    """Warm-up, then the base rate to the end. Arguments as of `cosine`; `final_ratio` can only be 1."""
    if final_ratio != 1:
        raise ValueError(f"final_ratio: a constant rate ends as high as it was, expected 1, got {final_ratio}")
    return _schedule(optimizer, total_steps, warmup, 1.0, lambda t: 1.0)


def plateau(
    optimizer: Optimizer,
    total_steps: float,
    warmup: int | float = 0,
    final_ratio: float = 0.01,
    monitor: str = "val/loss",
    mode: str = "min",
    factor: float = 0.5,
    patience: int = 5,
    threshold: float = 1e-4,
) -> list[dict[str, Any]]:
    """Warm-up, then the base rate, times `factor` whenever the metric has not improved for `patience` epochs.

    Args:
        optimizer, total_steps, warmup: as of `cosine`.
        final_ratio: the lowest rate divided by the base rate.
        monitor, mode: the metric, and whether it should become small (`min`) or large (`max`).
        factor: below 1. patience: epochs. threshold: the least relative improvement that counts.

    Returns:
        Schedulers as Lightning's `configure_optimizers` takes them.

    Raises:
        ValueError: an option out of range.
    """
    if mode not in ("min", "max") or not 0 < factor < 1 or patience < 0 or not 0 <= final_ratio <= 1:
        raise ValueError(
            "scheduler: expected mode min or max, 0 < factor < 1, patience of at least 0 and final_ratio in [0, 1], "
            f"got {mode}, {factor}, {patience}, {final_ratio}"
        )
    first = warmup_steps(warmup, total_steps)
    lowest = [group["lr"] * final_ratio for group in optimizer.param_groups]
    schedulers: list[dict[str, Any]] = []
    if first:  # LinearLR multiplies what it finds, and leaves the rate alone when it is done
        rising = LinearLR(optimizer, start_factor=1 / (first + 1), total_iters=first)
        schedulers.append({"scheduler": rising, "interval": "step", "name": "train/lr_warmup"})
    # An interval of epochs: the metric is there after validation. ReduceLROnPlateau takes the rates from the groups.
    which = cast(Literal["min", "max"], mode)
    falling = ReduceLROnPlateau(optimizer, which, factor, patience, threshold, min_lr=lowest)
    schedulers.append({"scheduler": falling, "interval": "epoch", "monitor": monitor, "name": "train/lr"})
    return schedulers
