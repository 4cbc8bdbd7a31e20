"""The oracle agrees with itself: recurrence = dense matrix, and with the definition written with flips."""

import itertools

import pytest
import torch
from problems import assert_close, oracle, problem, results

from bimamba.ops.ssd.reference import dense, ssd_reference


@pytest.mark.parametrize("form", ["causal", "tied", "untied"])
@pytest.mark.parametrize("options", [*itertools.product([False, True], repeat=3)])
def test_dense_matrix_equals_recurrence(form, options):
    shift, seq, states = options
    arguments = problem(
        causal=form == "causal", untied=form == "untied", D="hp", z=True, shift=shift, seq=seq, states=states
    )
    got = results(lambda **kw: ssd_reference(**kw, method=dense), arguments)
    assert_close(got, oracle(arguments), 1e-11)


def test_bidirectional_is_two_flipped_causal_scans():
    arguments = problem(D=None)
    flipped = {**arguments, "x": arguments["x"].flip(1), "backward": None}
    d = arguments["forward"]
    flipped["forward"] = d._replace(dt=d.dt.flip(1), B=d.B.flip(1), C=d.C.flip(1))
    forward = ssd_reference(**{**arguments, "backward": None})[0]
    assert_close({"y": ssd_reference(**arguments)[0]}, {"y": forward + ssd_reference(**flipped)[0].flip(1)}, 1e-12)


def test_shift_leaves_the_token_itself_to_D():
    arguments = problem(D=None, shift=True)
    x = arguments["x"].requires_grad_()
    y = ssd_reference(**arguments)[0]
    gradient = torch.autograd.grad(y[:, 5].sum(), x)[0]
    assert gradient[:, 5].abs().max() == 0
    assert (gradient[:, [4, 6]].abs() > 0).all()


def test_packed_sequences_equal_each_alone():
    arguments = problem(b=1, seq=True, states=False, D="h", z=True)
    index = arguments["seq_idx"]
    y = ssd_reference(**arguments)[0]
    for value in index.unique():
        keep = (index == value)[0]
        alone = {k: v[:, keep] if k in ("x", "z") else v for k, v in arguments.items()}
        alone["forward"] = arguments["forward"]._replace(
            **{k: getattr(arguments["forward"], k)[:, keep] for k in ("dt", "B", "C")}
        )
        alone |= {"backward": alone["forward"], "seq_idx": None}
        assert_close({"y": y[:, keep]}, {"y": ssd_reference(**alone)[0]}, 1e-12)
