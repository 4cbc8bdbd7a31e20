"""Parameter groups, Muon, and learning-rate schedules: warm-up, then cosine, linear, constant or plateau."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

_ENDLESS = "set trainer.max_epochs (with a data set of known length) or trainer.max_steps"


def undecayed_names(module: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone.

    These have at most one dimension (biases, norm scales, and with them `A_log`, `D` and `dt_bias` of shape `(h)`), or
    were marked by their layer (the same three in other shapes, positions, class tokens): by `undecayed` of
    `bimamba.nn.decay`, or with `param._no_weight_decay = True`, which copies of the parameter do not have. Decay would
    pull `A_log` and `dt_bias` to 0, which is to say every head towards one and the same memory length, whatever the
    data want.

    Ask before the module is sharded: FSDP shows every parameter as flat.
    """
    kept = {id(getattr(m, name, None)) for m in module.modules() for name in getattr(m, "_undecayed", ())}
    return {
        n for n, p in module.named_parameters() if p.ndim <= 1 or id(p) in kept or getattr(p, "_no_weight_decay", False)
    }


def hidden_names(module: nn.Module) -> set[str]:
    """Names of the matrices from features to features: linear layers and convolutions of the blocks and the embedding.

    Not among them: the embedding's first layer (or table), which reads letters or pixels, positions, the head, and
    depthwise convolutions, whose few taps a channel are no matrix. Ask before the module is sharded.
    """
    kinds = nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d
    layers = {f"{name}.weight": layer for name, layer in module.named_modules() if isinstance(layer, kinds)}
    numbers = layer_numbers([*layers, "head"])
    first = next((name for name, number in numbers.items() if number == 0), None)
    depthwise = {name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1}
    tables = {name for name, layer in layers.items() if isinstance(layer, nn.Embedding)}
    return {n for n in layers if numbers[n] != numbers["head"]} - {first} - depthwise - tables


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    undecayed: set[str] | None = None,
    layer_decay: float | None = None,
    lr: float | None = None,
    lr_scale: Mapping[str, float] | None = None,
    hidden: set[str] | None = None,
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
        hidden: names for a third group, `hidden`, decayed and marked by `hidden=True`; what `Muon` asks for. None:
            there is no such group.

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
        if hidden and name in hidden and kind == "decay":
            kind = "hidden"
        part, factor = parts.get(name, ("", 1.0))
        key = "/".join(k for k in (part, "" if layer_decay is None else f"layer_{layer}", kind) if k)
        if key not in groups:
            groups[key] = {"name": key, "params": [], "weight_decay": 0.0 if kind == "no_decay" else weight_decay}
            if hidden is not None:
                groups[key]["hidden"] = kind == "hidden"
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


class Muon(AdamW):
    """Muon for matrices between features, AdamW for everything else, as one optimizer, which Lightning's loop wants.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks": the momentum of a matrix is replaced
    by the nearest matrix whose singular values are all equal, and scaled so that the root mean square of an update is
    that of AdamW's (0.2; Liu et al. 2025, "Muon is scalable for LLM training"): a learning rate and weight decay mean
    the same for both. Kernels of convolutions count as matrices (out, in x taps).
    Matrices of one shape are taken together: `torch.optim.Muon` launches some 20 kernels for each single one, which is
    more than the rest of a small network's step, and takes no convolutions.

    Args:
        params: groups; those with `hidden=True` (of `parameter_groups`) are Muon's.
        lr, betas, eps, weight_decay, fused: as of `torch.optim.AdamW`; lr and weight_decay are Muon's, too.
        momentum: of Muon, Nesterov's.
        ns_steps: steps of the Newton-Schulz iteration.

    Raises:
        ValueError: options out of range, a hidden parameter of fewer than two dimensions, the state of another
            optimizer, or gradients that are still scaled (`fused=true` with `precision=16-mixed`).
    """

    asks_for_hidden = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        *,
        fused: bool | None = None,
    ) -> None:
        if not 0 <= momentum < 1 or ns_steps < 1 or ns_steps != int(ns_steps):
            raise ValueError(f"Muon: expected momentum in [0, 1), ns_steps of at least 1, got {momentum}, {ns_steps}")
        own = {"hidden": False, "momentum": momentum, "ns_steps": int(ns_steps)}
        groups = list(params)
        groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
        super().__init__([own | group for group in groups], lr, betas, eps, weight_decay, fused=fused)
        self.defaults |= own

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        flat = [tuple(p.shape) for p in added["params"] if p.ndim < 2]
        if added["hidden"] and flat:
            raise ValueError(f"Muon: expected matrices in a hidden group, got the shape {flat[0]}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved, own = ([g.get("hidden") for g in groups] for groups in (state_dict["param_groups"], self.param_groups))
        if saved != own:
            raise ValueError(f"Muon: expected the state of groups that are hidden={own}, got one of {saved}")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if getattr(self, "grad_scale", None) is not None:
            raise ValueError("Muon: expected unscaled gradients; with precision=16-mixed leave fused away")
        groups = self.param_groups
        try:
            self.param_groups = [g for g in groups if not g["hidden"]]
            _unhooked(AdamW.step)(self)
        finally:
            self.param_groups = groups
        self._step_hidden([g for g in groups if g["hidden"]])
        return loss

    def _step_hidden(self, groups: list[dict[str, Any]]) -> None:
        of_group = [[p for p in g["params"] if p.grad is not None] for g in groups]
        updates: dict[nn.Parameter, Tensor] = {}
        together: dict[tuple[int, int, int], list[nn.Parameter]] = {}
        for group, parameters in zip(groups, of_group, strict=True):
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p] |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
                together.setdefault((p.shape[0], p.numel() // p.shape[0], group["ns_steps"]), []).append(p)
            torch._foreach_add_([self.state[p]["step"] for p in parameters], 1)  # AdamW expects one of every parameter
            gradients = [cast(Tensor, p.grad) for p in parameters]
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
            updates |= dict(zip(parameters, ahead, strict=True))
        for (rows, columns, steps), members in together.items():
            update = orthogonal(torch.stack([updates[p].flatten(1) for p in members]), steps)
            update *= 0.2 * math.sqrt(max(rows, columns))
            # In the parameters' layout, or all that follows would be a launch each
            update = update.to(members[0].dtype, memory_format=torch.contiguous_format)
            updates |= {p: u.view_as(p) for p, u in zip(members, update.unbind(), strict=True)}
        for group, parameters in zip(groups, of_group, strict=True):
            if parameters:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, [updates[p] for p in parameters], alpha=-group["lr"])


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch wraps a class's `step`, once one of it was made, to call hooks: Muon's own has called them already."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Roughly U V^T of each matrix U S V^T, by the quintic Newton-Schulz iteration of Jordan et al. 2024.

    Its coefficients rise as steeply at 0 as they can: singular values end between 0.7 and 1.2 rather than at 1, except
    those that are far below the largest.

    Args:
        x: matrices (b, m, n); on a GPU it is computed in bfloat16, which is exact enough for that.
        steps: of the iteration.

    Returns:
        (b, m, n), bfloat16 on a GPU, else in x's dtype.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.shape[1] <= x.shape[2]
    y = (x if wide else x.mT).to(torch.bfloat16 if x.is_cuda else x.dtype)
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y if wide else y.mT


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
    """Warm-up, then the base rate, times `factor` whenever the metric has not improved for `patience` validations.

    Args:
        optimizer, total_steps, warmup: as of `cosine`.
        final_ratio: the lowest rate divided by the base rate.
        monitor, mode: the metric, and whether it should become small (`min`) or large (`max`).
        factor: below 1. patience: epochs with a validation. threshold: the least relative improvement that counts.

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
    config = {"scheduler": falling, "interval": "epoch", "monitor": monitor, "name": "train/lr"}
    # False: not Lightning's to step, but `Task`'s, which knows the validation's metrics before a checkpoint is saved
    schedulers.append(config | {"reduce_on_plateau": not monitor.startswith("val/")})
    return schedulers
