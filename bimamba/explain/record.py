"""What the scans of a network were given, layer by layer, during one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bimamba.nn import BiMamba2, ChannelMixer, Mamba2, mamba2
from bimamba.ops.ssd.reference import Direction, step_size

SCANS = ("bimamba_chunk_scan_combined", "mamba_chunk_scan_combined")


@dataclass
class Scan:
    """One call of a scan: its inputs, ready for the oracle `ssd_reference`, and its output.

    Args:
        x, y: `(b, l, h, p)`, what went in and what came out.
        forward, backward: the parameters of each direction; the same object if tied, `backward` None if causal.
        D: `(h)` or None.
        options: `dt_softplus`, `dt_limit`, `seq_idx`, `initial_states`, `shift`, as `ssd_reference` takes them.
    """

    x: Tensor
    y: Tensor
    forward: Direction
    backward: Direction | None
    D: Tensor | None
    options: dict[str, Any]

    @property
    def tied(self) -> bool:
        """Whether both directions read the same parameters."""
        return self.backward is self.forward

    def directions(self) -> dict[str, Direction]:
        """`forward` and, unless the scan is causal, `backward`."""
        return {"forward": self.forward} | ({} if self.backward is None else {"backward": self.backward})

    def step_sizes(self, direction: Direction) -> Tensor:
        """`delta (b, l, h)` in float32 or wider: what `dt` has become after bias, softplus and limit; 0 at padding."""
        dtype = torch.promote_types(direction.dt.dtype, torch.float32)
        return step_size(direction.dt, direction.dt_bias, self.options["dt_softplus"], self.options["dt_limit"], dtype)


def mixers(net: nn.Module) -> dict[str, nn.Module]:
    """The mixers that scan tokens, by their module names, from the first layer to the last; empty for attention.

    A channel mixer's scan runs over the channels of a token: its matrices and memories are not of tokens.
    """
    inside = {m for channels in net.modules() if isinstance(channels, ChannelMixer) for m in channels.modules()}
    found = {name: module for name, module in net.named_modules() if isinstance(module, BiMamba2 | Mamba2)}
    return {name: module for name, module in found.items() if module not in inside}


@contextmanager
def recording(net: nn.Module) -> Iterator[dict[str, Scan]]:
    """Keeps what the scans of `net` are given while the context is open: `{module name: its last call}`.

    The scans themselves are watched, not the mixers' methods: what is recorded is what the operator saw, whatever a
    mixer does before it.

    Raises:
        ValueError: the network has no scan.
    """
    found = mixers(net)
    if not found:
        raise ValueError("expected a network with BiMamba2 or Mamba2 mixers, got one without any scan")
    calls: dict[str, Scan] = {}
    inside: list[str] = []

    def watch(scan: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(scan)

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            y = scan(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            if inside:
                calls[inside[-1]] = _scan(given.arguments, y, bidirectional=scan.__name__ == SCANS[0])
            return y

        return watched

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args: inside.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    hooks = [h for name, m in found.items() for h in (m.register_forward_pre_hook(enter(name)),)]
    hooks += [m.register_forward_hook(leave) for m in found.values()]
    watching: dict[str, Any] = {name: watch(getattr(mamba2, name)) for name in SCANS}
    try:
        # On a GPU convolution, scan and norm are one operator; here they are called one by one
        parts = patch.object(mamba2._Mamba2, "_is_one_node", lambda *_: False)
        with patch.multiple(mamba2, **watching), parts:
            yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _scan(given: dict[str, Any], y: Tensor, bidirectional: bool) -> Scan:
    parameters = [given[name] for name in Direction._fields]
    untied = any(isinstance(value, tuple | list) for value in parameters)

    def direction(i: int) -> Direction:
        chosen: list[Any] = [v[i] if isinstance(v, tuple | list) else v for v in parameters]
        detached: list[Any] = [v if v is None else v.detach() for v in chosen]
        return Direction(*detached)

    forward = direction(0)
    backward = (direction(1) if untied else forward) if bidirectional else None
    states = given["initial_states"]
    states = (states, None) if not bidirectional else (states or (None, None))
    options = {k: given[k] for k in ("dt_softplus", "dt_limit", "seq_idx")}
    options |= {"initial_states": states, "shift": given.get("shift", False)}
    y = y[0] if isinstance(y, tuple) else y
    return Scan(given["x"].detach(), y.detach(), forward, backward, given["D"], options)
