"""Every argument of the scan alone and in pairs, against the recurrence in float64: outputs, states, all gradients.

Tolerances: measured at most 4e-6 (float32) and 1e-3 (float16: its 10 bits, in sums over few tokens) at these sizes.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from problems import assert_close, oracle, problem

from bimamba.ops.ssd.kernels.choose import forced

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
OPTIONS = {
    "D_heads": dict(D="h"),
    "D_channels": dict(D="hp"),
    "gate": dict(z=True),
    "no_bias": dict(dt_bias=False),
    "linear_dt": dict(dt_softplus=False),
    "dt_limit": dict(dt_limit=(0.08, 0.2)),
    "packed": dict(seq=True),
    "states": dict(states=True),
    "untied": dict(untied=True),
    "shift": dict(shift=True),
    "causal": dict(causal=True),
    "recompute": dict(save_states=False),
    "halves": dict(halves=2),
    "filled": dict(fill=2),
}
EXCLUSIVE = [
    {"D_heads", "D_channels"},
    {"causal", "untied"},
    {"causal", "shift"},
    {"halves", "untied"},
    {"halves", "shift"},
    {"filled", "untied"},
    {"filled", "shift"},
    {"filled", "recompute"},
    {"filled", "halves"},
]
PAIRS = [pair for pair in combinations(OPTIONS, 2) if set(pair) not in EXCLUSIVE]


def check(run, names, dtype, **sizes):
    options = {}
    for name in names:
        options |= OPTIONS[name]
    save = options.pop("save_states", True)
    halves, fill = options.pop("halves", 1), options.pop("fill", 1)
    arguments = problem(**{"b": 2, "l": 37, "h": 2, "g": 1, "p": 5, "n": 7, **sizes}, dtype=dtype, **options)
    if not arguments["dt_softplus"]:  # steps below zero are clamped: keep most of them above
        for which in ("forward", "backward"):
            d = arguments[which]
            if d is not None and (which == "forward" or "untied" in names):
                arguments[which] = d._replace(dt=(d.dt + 2.3) * 0.1)
        if arguments["backward"] is not None and "untied" not in names:
            arguments["backward"] = arguments["forward"]

    from problems import results

    with forced(chunk=16 * halves, halves=halves, fill=fill):
        got = results(lambda **kw: run(save_states=save, **kw), arguments)
    assert_close(got, oracle(arguments), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["plain", *OPTIONS])
def test_alone(run, name, dtype):
    check(run, [] if name == "plain" else [name], dtype)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs(run, pair):
    check(run, pair, torch.float32)


@pytest.mark.parametrize("pair", PAIRS[::6], ids="-".join)
def test_pairs_float16(run, pair):
    check(run, pair, torch.float16, l=13)


@pytest.mark.parametrize("sizes", [dict(h=4, g=2), dict(p=20, n=33), dict(b=1, h=3, g=3, p=17, n=16)], ids=str)
def test_sizes(run, sizes):
    check(run, ["D_channels", "gate"], torch.float32, **sizes)
