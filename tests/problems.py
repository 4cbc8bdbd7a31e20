"""Scan problems shared by the tests of every implementation: sizes, options and how errors are measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bimamba.ops.ssd.reference import Direction, ssd_reference

SEGMENTS = {13: [[4, 3, 6], [1, 1, 11]], 37: [[5, 20, 12], [36, 1]], 70: [[31, 2, 37], [64, 6]]}
SEGMENTS[101] = [[16, 1, 15, 48, 21]]  # some begin where a chunk of 16 does


def relative_error(value: Tensor, expected: Tensor) -> float:
    """`|value - expected| / |expected|` in float64; NaN if any is NaN."""
    value, expected = value.detach().double(), expected.detach().double()
    return ((value - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def seq_idx(b: int, l: int, device="cpu") -> Tensor:
    """`(b, l)` int32: rows of several sequences, each row cut otherwise."""
    rows = [torch.repeat_interleave(torch.arange(len(cut)), torch.tensor(cut)) for cut in SEGMENTS[l]]
    return torch.stack([rows[i % len(rows)] for i in range(b)]).int().to(device)


def direction(b, l, h, g, n, dtype=torch.float64, device="cpu", seed=0, dt_bias=True) -> Direction:
    """Parameters of one direction; B is scaled so that outputs are of order one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = [
        draw(b, l, h) - 2,
        -torch.rand(h, generator=generator, dtype=torch.float64) * 5 - 0.5,
        draw(b, l, g, n) / n**0.5,
        draw(b, l, g, n),
        draw(h) * 0.3,
    ]
    keep = torch.promote_types(dtype, torch.float32)
    dtypes = [dtype, keep, dtype, dtype, keep]
    values = [v.to(device, d) for v, d in zip(values, dtypes, strict=True)]
    return Direction(*values[:4], values[4] if dt_bias else None)


def problem(
    b=2, l=13, h=4, p=3, g=2, n=5, dtype=torch.float64, device="cpu", seed=0, untied=False, causal=False, **choose: Any
) -> dict[str, Any]:
    """Keyword arguments of `ssd_reference` and `ssd_chunked`. `choose`: D ("h", "hp"), z, seq, states, dt_bias, and
    options that are passed on."""
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(*shape, to=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, to)

    keep = torch.promote_types(dtype, torch.float32)
    dt_bias = choose.pop("dt_bias", True)
    forward = direction(b, l, h, g, n, dtype, device, seed, dt_bias)
    backward = direction(b, l, h, g, n, dtype, device, seed + 7, dt_bias) if untied else forward
    D, z, seq, states = (choose.pop(k, None) for k in ("D", "z", "seq", "states"))
    return dict(
        x=draw(b, l, h, p),
        forward=forward,
        backward=None if causal else backward,
        D={None: None, "h": draw(h, to=keep), "hp": draw(h, p, to=keep)}[D],
        z=draw(b, l, h, p) if z else None,
        seq_idx=seq_idx(b, l, device) if seq else None,
        initial_states=tuple(draw(b, h, p, n, to=keep) if states and not (causal and i) else None for i in range(2)),
        **{"dt_softplus": True, **choose},
    )


def leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The float tensors of a problem by name; a tied direction counts once."""
    found = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()}
    for which in ("forward", "backward"):
        d = arguments[which]
        if d is not None and not (which == "backward" and d is arguments["forward"]):
            found |= {f"{which}.{k}": v for k, v in d._asdict().items() if v is not None}
    for which, state in zip(("forward", "backward"), arguments["initial_states"], strict=True):
        if state is not None:
            found[f"state.{which}"] = state
    return found


def rebuilt(arguments: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The problem with its float tensors replaced by those of `leaves`, by name."""
    out = {k: tensors.get(k, v) for k, v in arguments.items()}
    for which in ("forward", "backward"):
        if arguments[which] is not None:
            own = which if f"{which}.dt" in tensors else "forward"
            out[which] = Direction(**{k: tensors.get(f"{own}.{k}") for k in Direction._fields})
    if out["backward"] is not None and "backward.dt" not in tensors:
        out["backward"] = out["forward"]
    out["initial_states"] = tuple(tensors.get(f"state.{which}") for which in ("forward", "backward"))
    return out


def results(run, arguments: dict[str, Any], seed: int = 5) -> dict[str, Tensor]:
    """Outputs, final states and the gradients of every float input, by name, for cotangents drawn from `seed`.

    `run` maps the arguments of `ssd_reference` to its results.
    """
    tensors = {k: v.detach().clone().requires_grad_() for k, v in leaves(arguments).items()}
    y, final_forward, final_backward = run(**rebuilt(arguments, tensors))
    out = {"y": y, "final.forward": final_forward, "final.backward": final_backward}
    out = {k: v for k, v in out.items() if v is not None}
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for v in out.values()]
    gradients = torch.autograd.grad(list(out.values()), list(tensors.values()), cotangents, allow_unused=True)
    grads = {
        f"d {k}": v if v is not None else torch.zeros_like(tensors[k]) for k, v in zip(tensors, gradients, strict=True)
    }
    return {k: v.detach() for k, v in (out | grads).items()}


def oracle(arguments: dict[str, Any], seed: int = 5) -> dict[str, Tensor]:
    """`results` of the recurrence in float64."""

    def double(v):
        return v.double() if isinstance(v, Tensor) and v.is_floating_point() else v

    tensors = {k: double(v) for k, v in leaves(arguments).items()}
    return results(ssd_reference, rebuilt(arguments, tensors), seed)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each result by name within a relative error (absolute where the expected value is zero)."""
    assert got.keys() == expected.keys()
    errors = {}
    for name, value in got.items():
        if expected[name].norm() == 0:
            errors[name] = value.double().norm().item()
        else:
            errors[name] = relative_error(value, expected[name])
    bad = {k: f"{v:.1e}" for k, v in errors.items() if not v <= tolerance}
    assert not bad, f"beyond {tolerance:.0e}: {bad}"
