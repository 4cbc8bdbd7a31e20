"""The chunked PyTorch path against the oracle: outputs, final states and every gradient by name."""

import itertools

import pytest
import torch
from problems import assert_close, leaves, oracle, problem, rebuilt, results

from bimamba.ops.ssd.chunked import best_chunk, ssd_chunked


def run(chunk_size=None):
    return lambda **kw: ssd_chunked(**kw, chunk_size=chunk_size)


@pytest.mark.parametrize("form", ["causal", "tied", "untied"])
@pytest.mark.parametrize("options", [*itertools.product([False, True], repeat=3)])
@pytest.mark.parametrize("chunk_size", [4, 64])
def test_every_form_equals_the_oracle(form, options, chunk_size):
    shift, seq, states = options
    arguments = problem(
        causal=form == "causal", untied=form == "untied", D="h", z=True, shift=shift, seq=seq, states=states
    )
    assert_close(results(run(chunk_size), arguments), oracle(arguments), 1e-11)


@pytest.mark.parametrize("l", [1, 2, 3, 16, 31, 33, 100])
def test_any_length(l):
    arguments = problem(b=1, l=l, states=True)
    assert_close(results(run(16), arguments), oracle(arguments), 1e-11)


@pytest.mark.parametrize("sizes", [dict(h=1, g=1, p=1, n=1), dict(h=6, g=3, p=7, n=2), dict(h=4, g=4, p=2, n=9)])
def test_any_sizes(sizes):
    arguments = problem(**sizes, D="hp")
    assert_close(results(run(), arguments), oracle(arguments), 1e-11)


@pytest.mark.parametrize(
    "options",
    [
        dict(dt_softplus=False, dt_bias=False),
        dict(dt_limit=(0.1, 0.2)),
        dict(dt_softplus=False),
        dict(dt_limit=(0.0, 0.1)),
    ],
    ids=str,
)
def test_step_sizes(options):
    arguments = problem(**options)
    if not options.get("dt_softplus", True):
        d = arguments["forward"]._replace(dt=arguments["forward"].dt.abs())
        arguments |= {"forward": d, "backward": d}
    got, expected = results(run(4), arguments), oracle(arguments)
    assert_close(got, expected, 1e-11)


def test_clamped_step_sizes_have_no_gradient():
    got = results(run(), problem(dt_limit=(1e-9, 2e-9)))
    assert got["d forward.dt"].abs().max() == 0


# measured, largest of all results: 1.0e-6 (fp32, d A), 2.4e-3 (bf16) and 4.4e-4 (fp16), the rounding of the gradients
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_low_precision_inputs_accumulate_in_float32(dtype, tolerance):
    arguments = problem(l=100, p=16, n=16, dtype=dtype, D="h", z=True)
    got = results(run(), arguments)
    assert got["y"].dtype == dtype and got["final.forward"].dtype == torch.float32
    assert_close(got, oracle(arguments), tolerance)


@pytest.mark.parametrize("decay", [-1e-6, -50.0])
def test_weak_and_strong_decay_stay_finite(decay):
    arguments = problem(l=70, dtype=torch.float32, dt_softplus=False, dt_bias=False)
    d = arguments["forward"]
    d = d._replace(dt=torch.ones_like(d.dt), A=torch.full_like(d.A, decay))
    arguments |= {"forward": d, "backward": d}
    got = results(run(16), arguments)
    assert all(v.isfinite().all() for v in got.values())
    # d A of strong decay is a difference of tiny numbers; y and the other gradients are not
    assert_close({"y": got["y"], "dx": got["d x"]}, {"y": (e := oracle(arguments))["y"], "dx": e["d x"]}, 2e-6)


def test_gradcheck():
    arguments = problem(b=1, l=5, h=2, p=2, g=1, n=2, D="h", z=True, states=True)
    tensors = {k: v.detach().requires_grad_() for k, v in leaves(arguments).items()}

    def scan(*values):
        out = ssd_chunked(**rebuilt(arguments, dict(zip(tensors, values, strict=True))), chunk_size=2)
        return tuple(o for o in out if o is not None)

    assert torch.autograd.gradcheck(scan, tuple(tensors.values()))


def test_a_step_of_zero_has_the_right_gradient():
    """Where delta is exactly 0 the decays of both directions tie; the gradient must not be split between them."""
    arguments = problem(l=9, dt_softplus=False, dt_bias=False)
    dt = arguments["forward"].dt.abs()
    dt[:, 3:6] = 0.0
    d = arguments["forward"]._replace(dt=dt)
    arguments |= {"forward": d, "backward": d}
    assert_close(results(run(4), arguments), oracle(arguments), 1e-11)


def test_two_runs_give_the_same_bits():
    arguments = problem(l=70, dtype=torch.float32)
    first, second = results(run(), arguments), results(run(), arguments)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_chunk_lengths_are_powers_of_two_in_range():
    assert [best_chunk(999, p, n) for p, n in ((1, 1), (32, 32), (64, 64), (64, 128), (256, 256))] == [
        16, 32, 64, 128, 128,
    ]  # fmt: skip
    assert [best_chunk(l, 32, 32) for l in (1, 33, 96, 97)] == [1, 33, 96, 32]  # one chunk has no states
