"""The scan as a PyTorch operator: opcheck, compile, checkpointing, torch.func, repeatability, NaN, layouts."""

from __future__ import annotations

import pytest
import torch
from problems import assert_close, leaves, oracle, problem, rebuilt, results

from bimamba.ops.backend import triton_unavailable
from bimamba.ops.ssd import binding  # noqa: F401 - registers the operators

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(untied=False, extras=True, l=17):
    """Arguments of `bimamba::scan`, permuted in memory, requiring gradients."""
    a = problem(b=1, l=l, h=2, p=16, g=1, n=16, dtype=torch.float32, device=DEVICE, untied=untied, D="h", z=True)
    f, k = a["forward"], a["backward"]
    state = torch.randn(1, 2, 16, 16, device=DEVICE)
    tensors = [a["x"], *f[:4], *(k[:4] if untied else [None] * 4), f.dt_bias, k.dt_bias if untied else None, a["D"]]
    tensors += [a["z"], torch.zeros(1, l, dtype=torch.int32, device=DEVICE), state, state] if extras else [None] * 4

    def permuted(t):
        if t is None or not t.is_floating_point():
            return t
        t = t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 2 else t.clone()
        return t.detach().requires_grad_()

    return (*map(permuted, tensors), True, 0.0, float("inf"), True, False, True, True, True, False)


@pytest.mark.parametrize("untied, extras", [(False, True), (True, False)])
def test_opcheck(untied, extras):
    torch.library.opcheck(torch.ops.bimamba.scan.default, operands(untied, extras))


def test_opcheck_backward():
    *inputs, _final, _train, _save, tf32 = operands()
    inputs = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    y, ends, *saved = torch.ops.bimamba.scan(*inputs, True, True, True, tf32)
    torch.library.opcheck(torch.ops.bimamba.scan_backward.default, (y, ends, *inputs, *saved, tf32))


def scan_leaves(run, **options):
    a = problem(b=1, l=19, h=2, p=16, g=1, n=16, dtype=torch.float32, device=DEVICE, D="h", **options)
    tensors = {k: v.clone().requires_grad_() for k, v in leaves(a).items()}
    names = list(tensors)
    return names, list(tensors.values()), lambda *values: run(**rebuilt(a, dict(zip(names, values, strict=True))))[0]


def gradients(f, values):
    return torch.autograd.grad(f(*values).square().sum(), values)


def test_compile_fullgraph(run):
    _, values, f = scan_leaves(run)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled, values), gradients(f, values), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_checkpoint(run):
    _, values, f = scan_leaves(run)

    def checkpointed(*v):
        return torch.utils.checkpoint.checkpoint(f, *v, use_reentrant=False)

    for got, expected in zip(gradients(checkpointed, values), gradients(f, values), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_functional_gradient(run):
    _, values, f = scan_leaves(run)
    expected = gradients(f, values)
    got = torch.func.grad(lambda *v: f(*v).square().sum(), argnums=tuple(range(len(values))))(*values)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_second_derivatives_are_refused(run):
    _, values, f = scan_leaves(run)
    grads = torch.autograd.grad(f(*values).sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*BIMAMBA_BACKEND=torch"):
        grads[0].square().sum().backward()


def test_two_runs_give_the_same_bits(run):
    a = problem(b=2, l=37, h=4, p=16, g=2, n=16, dtype=torch.float32, device=DEVICE, D="h", z=True, seq=True)
    first, second = results(run, a), results(run, a)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_layout_does_not_matter(run):
    a = problem(b=2, l=13, h=4, p=6, g=2, n=5, dtype=torch.float32, device=DEVICE, D="hp", z=True, states=True)
    strided = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in leaves(a).items() if v.dim() > 1}
    strided = rebuilt(a, leaves(a) | strided)
    assert_close(results(run, strided), results(run, a), 0.0)


def test_partial_gradients(run):
    """Frozen inputs get none, and the others do not change."""
    names, values, f = scan_leaves(run)
    expected = dict(zip(names, gradients(f, values), strict=True))
    frozen = [v if name in ("x", "forward.B") else v.detach() for name, v in zip(names, values, strict=True)]
    got = torch.autograd.grad(f(*frozen).square().sum(), [v for v in frozen if v.requires_grad])
    torch.testing.assert_close(got[0], expected["x"], rtol=0, atol=0)
    torch.testing.assert_close(got[1], expected["forward.B"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["x", "forward.dt", "forward.B", "forward.C", "D"])
def test_nan_goes_through(run, name):
    names, values, f = scan_leaves(run)
    values = [v.detach() for v in values]
    values[names.index(name)].view(-1)[5 % values[names.index(name)].numel()] = torch.nan
    assert f(*values).isnan().any()


def test_one_initial_state_is_enough(run):
    a = problem(b=1, l=13, h=2, p=4, g=1, n=4, dtype=torch.float32, device=DEVICE, states=True)
    a["initial_states"] = (None, a["initial_states"][1])
    assert_close(results(run, a), oracle(a), 1e-5)


def test_unavailable_names_the_device():
    if DEVICE == "cpu":
        assert triton_unavailable(torch.zeros(1)) is None  # the interpreter
    else:
        assert "cpu" in triton_unavailable(torch.zeros(1))
