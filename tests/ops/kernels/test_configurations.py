"""Every kind of launch configuration, forced, over lengths around the edges of chunks, and what the rule chooses."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from problems import assert_close, oracle, problem, results

from bimamba.ops.ssd.kernels import choose as choosing
from bimamba.ops.ssd.kernels.choose import Problem, choose, forced

LENGTHS = [1, 2, 15, 16, 17, 33]
FORMS = [
    dict(chunk=16, halves=1, together=True),
    dict(chunk=32, halves=2),
    dict(chunk=16, halves=1, fill=2, together=True),
]


def check(run, config, **sizes):
    arguments = problem(**{"b": 1, "h": 2, "g": 1, "p": 16, "n": 16, **sizes}, dtype=torch.float32, D="h", states=True)
    with forced(**config):
        got = results(run, arguments)
    assert_close(got, oracle(arguments), 1e-5)


@pytest.mark.parametrize("form", FORMS, ids=["whole", "halves", "filled"])
@pytest.mark.parametrize("l", LENGTHS)
def test_lengths(run, form, l):
    check(run, form, l=l)


@pytest.mark.parametrize("form", FORMS[1:], ids=["halves", "filled"])
@pytest.mark.parametrize("l", LENGTHS)
def test_lengths_causal(run, form, l):
    check(run, form, l=l, causal=True)


@pytest.mark.parametrize("form, walk, tma", list(product(FORMS, (False, True), (False, True))))
def test_passing_and_descriptors(run, form, walk, tma):
    check(run, {**form, "walk": walk, "tma": tma, "passing_block": 64}, l=37)


@pytest.mark.parametrize(
    "form, walk, causal",
    [(FORMS[0], True, False), (FORMS[0], False, False), (FORMS[1], True, True), (FORMS[2], False, False)],
)
def test_packed_over_several_chunks(run, form, walk, causal):
    """Sequences of one row, less than a chunk, and several chunks; some begin where a chunk does."""
    arguments = problem(b=1, l=101, h=2, g=1, p=8, n=8, dtype=torch.float32, D="h", seq=True, causal=causal)
    with forced(**form, walk=walk, passing_block=64):
        got = results(run, arguments)
    assert_close(got, oracle(arguments), 1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_in_parts(run, heads, tied):
    config = dict(chunk=16, halves=1, grad_bc_heads=heads, grad_x_heads=heads, output_heads=heads)
    check(run, config, l=19, h=4, untied=not tied)


@pytest.mark.parametrize("group", [1, 2, 3, 132])
@pytest.mark.parametrize("heads_bc, heads_x", [(4, 4), (4, 1), (1, 4), (2, 1)])
@pytest.mark.parametrize("form, halves", [({}, 1), ({}, 2), (dict(untied=True), 1), (dict(causal=True, g=2), 1)])
def test_gradients_side_by_side(run, group, heads_bc, heads_x, form, halves):
    """Every part of both, whether there are as many of one kind as of the other, and whatever the last group holds."""
    heads = 4 // form.get("g", 1)
    config = dict(grad_bc_heads=min(heads, heads_bc), grad_x_heads=min(heads, heads_x), grad_bc_block_n=16, block_n=16)
    config |= dict(chunk=16 * halves, halves=halves, together=True, group=group)
    check(run, config, **{"b": 2, "l": 40, "h": 4, "n": 32, **form})


@pytest.mark.parametrize("form", FORMS, ids=["whole", "halves", "filled"])
@pytest.mark.parametrize("block_p, block_n", [(16, 16), (32, 16), (16, 32)])
def test_blocks(run, form, block_p, block_n):
    config = dict(block_p=block_p, block_n=block_n, states_block_n=block_n, grad_bc_block_n=16)
    check(run, {**form, **config}, l=19, p=24, n=32)


@pytest.mark.parametrize("shift, untied", [(True, False), (True, True), (False, True)])
def test_blocks_of_two_matrices(run, shift, untied):
    config = dict(chunk=16, halves=1, block_p=16, block_n=16, states_block_n=16, grad_bc_block_n=16)
    check(run, config, l=19, p=24, n=32, shift=shift, untied=untied)


def test_gradients_walk_from_one_walk_a_processor_on(monkeypatch):
    """In halves of n up to two; the forward pass from two walks a processor on, or, where n is large, like them."""
    monkeypatch.setattr(choosing, "_device", lambda device: choosing.Device(132, True, 232448))
    expected = {
        64: {6: ((False, 64), (False, 64)), 8: ((False, 64), (True, 32)), 17: ((True, 64), (True, 64))},
        128: {3: ((False, 64), (False, 64)), 4: ((True, 32), (True, 32)), 9: ((True, 64), (True, 64))},
    }
    for n, b in [(size, rows) for size, given in expected.items() for rows in given]:
        t = Problem(b=b, l=4096, h=8, g=1, p=64, n=n, dtype=torch.bfloat16, device=torch.device("cpu"))
        passes = [choose(t, True, backward) for backward in (False, True)]
        assert tuple((c.walk, c.states_block_n) for c in passes) == expected[n][b], (n, b)
        alone = choose(t, False, False)  # no gradient follows
        assert (alone.walk, alone.states_block_n) == expected[n][b][0], (n, b)


SIZES = list(
    product((1, 8), (1, 40, 2048), (3, 24), (1, 3), (5, 64, 256), (1, 64, 200), (torch.float32, torch.bfloat16))
)


@pytest.mark.parametrize("b, l, h, g, p, n, dtype", SIZES)
def test_rule_is_consistent(b, l, h, g, p, n, dtype):
    for saved, form in product((True, False), ({}, {"untied": True}, {"shift": True}, {"bidirectional": False})):
        t = Problem(b=b, l=l, h=h, g=g, p=p, n=n, dtype=dtype, device=torch.device("cpu"), **form)
        passes = [choose(t, saved, backward) for backward in (False, True)]
        assert len({(c.chunk, c.halves, c.fill) for c in passes}) == 1
        for c in passes:
            assert c.chunk % c.halves == 0 and c.rows >= 16
            assert c.rows >= 32 or not c.grad_x_row_tma  # a line of 16 is 64 bytes: too few for a buffer of its own
            for block, size in (
                (c.block_p, t.p2),
                (c.block_n, t.n2),
                (c.states_block_n, t.n2),
                (c.grad_bc_block_n, t.n2),
            ):
                assert size % block == 0
            for heads in (c.output_heads, c.grad_x_heads, c.grad_bc_heads):
                assert (h // g) % heads == 0
            assert c.group >= 1
            assert c.halves == c.fill == 1 or not (t.untied or t.shift or c.block_n < t.n2)
