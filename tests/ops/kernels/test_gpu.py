"""The kernels on a GPU (`pytest -m gpu`): dtypes, sizes, every launch configuration, long and huge tensors, decays.

Bounds are what the project asks of its kernels: relative error 4e-3 (bf16), 6e-4 (fp16), 1e-5 (fp32) for outputs and
every gradient, as norms over many heads: dA of one head is a sum over all tokens that may nearly vanish.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from problems import assert_close, leaves, problem, rebuilt, relative_error, results

from bimamba.ops.ssd.api import bimamba_chunk_scan_combined
from bimamba.ops.ssd.chunked import ssd_chunked
from bimamba.ops.ssd.kernels.choose import LITTLE, forced

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}


def exact(arguments: dict) -> dict:
    """`results` in float64 by the chunked PyTorch path, itself proven against the recurrence."""
    double = {k: v.double() for k, v in leaves(arguments).items()}
    return results(ssd_chunked, rebuilt(arguments, double))


def check(run, dtype, config=None, **sizes):
    a = problem(**{"b": 2, "l": 300, "h": 64, "g": 2, **sizes}, dtype=dtype, device="cuda", D="h")
    with forced(**(config or {})):
        got = results(run, a)
    assert_close(got, exact(a), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("n", [16, 64, 128, 256])
@pytest.mark.parametrize("p", [16, 32, 64, 128])
def test_sizes(run, p, n, dtype):
    check(run, dtype, p=p, n=n)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    "options",
    [dict(untied=True), dict(shift=True), dict(causal=True), dict(z=True, states=True), dict(shift=True, untied=True)],
    ids=str,
)
def test_forms(run, options, dtype):
    check(run, dtype, p=64, n=64, **options)


@pytest.mark.parametrize("n", [16, 32, 64, 128])
@pytest.mark.parametrize("h", [8, 24])
def test_states_recomputed(run, h, n):
    """The gradients in two launches, over halves of a chunk, many programs of each."""
    a = problem(b=32, l=1024, h=h, p=64, g=1, n=n, dtype=torch.bfloat16, device="cuda", D="h")
    got, saved = (results(partial(run, save_states=keep), a) for keep in (False, True))
    assert_close(got, saved, BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("p, n", [*itertools.product([16, 32, 64, 128], [16, 32, 64, 128]), (64, 256)])
def test_descriptors(run, p, n):
    """Sizes for which the rule takes descriptors, states saved and recomputed."""
    a = problem(b=4, l=1100, h=64, p=p, g=2, n=n, dtype=torch.bfloat16, device="cuda", D="h")
    assert a["x"].numel() > LITTLE
    expected = exact(a)
    for keep in (True, False):
        assert_close(results(partial(run, save_states=keep), a), expected, BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("p, n", [(1, 1), (3, 5), (100, 50), (256, 256)])
def test_odd_sizes(run, p, n):
    check(run, torch.float32, p=p, n=n, l=65, h=4)
    check(run, torch.bfloat16, p=p, n=n, l=65)


FORMS = [dict(chunk=64), dict(chunk=128, halves=2), dict(chunk=64, fill=2)]
PACKED = [(dict(form, walk=walk, tma=tma), {}) for form in FORMS for walk in (False, True) for tma in (False, True)]
PACKED += [(FORMS[0], options) for options in (dict(untied=True), dict(shift=True), dict(causal=True))]
PACKED += [({}, {}), ({}, dict(n=128)), (dict(chunk=64, fill=2, walk=True, tma=True, states_block_n=32), {})]


@pytest.mark.parametrize("config, options", PACKED, ids=str)
def test_packed(run, config, options):
    """Sequences of 1 to 500 tokens: most chunks of 64 hold rows of one of them alone, some of several."""
    if config.get("tma") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tensor descriptors on this GPU")
    a = problem(
        **{"b": 2, "l": 1100, "h": 64, "g": 2, "p": 64, "n": 64, **options}, dtype=torch.bfloat16, device="cuda"
    )
    starts = torch.rand(2, 1100, generator=torch.Generator().manual_seed(0)) < 0.008
    starts[0, [64, 128, 129, 640]] = True
    a["seq_idx"] = starts.cumsum(1).int().cuda()
    with forced(**config):
        got = results(run, a)
    assert_close(got, exact(a), BOUNDS[torch.bfloat16])


def test_any_address(run):
    """A contiguous tensor at an odd address, which tensor descriptors would refuse."""
    a = problem(b=8, l=512, h=16, p=64, g=1, n=64, dtype=torch.bfloat16, device="cuda", D="h")
    buffer = a["x"].new_empty(a["x"].numel() + 1)
    moved = buffer[1:].view(a["x"].shape).copy_(a["x"])
    for x, y in zip(results(run, a).items(), results(run, a | {"x": moved}).items(), strict=True):
        assert torch.equal(x[1], y[1]), x[0]


CONFIGURATIONS = (
    [
        dict(chunk=chunk * halves, halves=halves, walk=walk, tma=tma, grad_bc_heads=heads, grad_x_heads=heads)
        for chunk in (16, 32, 64)
        for halves in (1, 2)
        for walk in (False, True)
        for tma in (False, True)
        for heads in ((8,) if chunk < 64 else (2, 8))
    ]
    + [
        dict(output_stages=s, grad_x_stages=s, grad_bc_stages=s, states_stages=s, chunk=c, halves=h)
        for s in (1, 2)
        for c, h in ((64, 1), (128, 2))
    ]
    + [dict(chunk=64, fill=2, walk=walk, tma=tma) for walk in (False, True) for tma in (False, True)]
    + [dict(chunk=64, fill=fill, walk=True, tma=tma, states_block_n=32) for fill in (1, 2) for tma in (False, True)]
    + [dict(chunk=128, halves=2, walk=True, tma=tma, states_block_n=32) for tma in (False, True)]
    + [dict(together=together, group=group) for together, group in ((False, 1), (True, 1), (True, 7), (True, 132))]
)


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=str)
def test_configurations(run, config):
    if config.get("tma") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tensor descriptors on this GPU")
    check(run, torch.bfloat16, config, p=64, n=64)


@pytest.mark.parametrize("power", [17, 20])
def test_long_sequences(power):
    """Sampled rows and gradients: the oracle sees a window wide enough for all memory to fade."""
    l, window, h, p, n = 2**power, 2048, 2, 16, 16
    a = problem(b=1, l=l, h=h, p=p, g=1, n=n, dtype=torch.float32, device="cuda", D="h")
    t = {k: v.clone().requires_grad_() for k, v in leaves(a).items()}
    f = rebuilt(a, t)["forward"]
    shared = dict(D=t["D"], dt_bias=f.dt_bias, dt_softplus=True)
    y = bimamba_chunk_scan_combined(t["x"], f.dt, f.A, f.B, f.C, backend="triton", **shared)
    dy = torch.randn_like(y)
    dx, dB = torch.autograd.grad(y, [t["x"], f.B], dy)
    for start in (0, l // 2 - 1000, l - window):
        w = slice(start, start + window)
        d = {k: v[:, w].detach().double().requires_grad_() for k, v in dict(x=t["x"], dt=f.dt, B=f.B, C=f.C).items()}
        g = f._replace(dt=d["dt"], A=f.A.detach().double(), B=d["B"], C=d["C"], dt_bias=f.dt_bias.detach().double())
        yw, *_ = ssd_chunked(d["x"], g, g, D=t["D"].detach().double(), dt_softplus=True)
        dxw, dBw = torch.autograd.grad(yw, [d["x"], d["B"]], dy[:, w].double())
        inner = slice(0 if start == 0 else 800, window if start + window == l else window - 800)
        got = {"y": y[:, w][:, inner], "dx": dx[:, w][:, inner], "dB": dB[:, w][:, inner]}
        assert_close(got, {"y": yw[:, inner], "dx": dxw[:, inner], "dB": dBw[:, inner]}, 2e-5)


def test_beyond_two_to_the_31_elements():
    l, h, p = 2**20 + 70, 33, 64  # x holds 2.2e9 elements
    x = torch.randn(1, l, h, p, dtype=torch.bfloat16, device="cuda").requires_grad_()
    dt, A = torch.full((1, l, h), -1.0, device="cuda"), torch.full((h,), -1.0, device="cuda")
    B, C = (torch.randn(1, l, 1, 16, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    y = bimamba_chunk_scan_combined(x, dt, A, B, C, dt_softplus=True, backend="triton", save_states=False)
    dy = torch.zeros_like(y)
    dy[:, -300:] = torch.randn(1, 300, h, p, device="cuda").to(dy)
    (dx,) = torch.autograd.grad(y, x, dy)
    w = slice(l - 700, l)
    xs = x[:, w].detach().requires_grad_()
    ys = bimamba_chunk_scan_combined(xs, dt[:, w], A, B[:, w], C[:, w], dt_softplus=True, backend="torch")
    (dxs,) = torch.autograd.grad(ys, xs, dy[:, w])
    got, expected = (y[:, w][:, 300:], dx[:, w][:, 300:]), (ys[:, 300:], dxs[:, 300:])
    got, expected = (dict(zip(("y", "dx"), pair, strict=True)) for pair in (got, expected))
    assert_close(got, expected, BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("a", [-1e-6, -1e-3, -0.5, -5.0, -50.0])
def test_decays(run, a, dtype):
    """A dt from weak to strong: no Inf, no NaN, outputs and gradients of x, B, C within the bounds."""
    p = problem(b=2, l=300, h=4, p=32, g=1, n=32, dtype=dtype, device="cuda")
    f = p["forward"]._replace(dt=torch.full_like(p["forward"].dt, 0.1), A=torch.full_like(p["forward"].A, a * 10))
    p |= dict(forward=f._replace(dt_bias=None), backward=None, dt_softplus=False)
    p["backward"] = p["forward"]
    got, expected = results(run, p), exact(p)
    assert all(v.isfinite().all() for v in got.values())
    names = [k for k in got if k not in ("d forward.A", "d forward.dt")]  # these vanish against their terms at -50
    assert_close({k: got[k] for k in names}, {k: expected[k] for k in names}, BOUNDS[dtype])


def test_two_runs_give_the_same_bits(run):
    a = problem(b=4, l=1000, h=8, p=64, g=2, n=64, dtype=torch.bfloat16, device="cuda", D="h", z=True)
    first, second = results(run, a), results(run, a)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_compile_and_cuda_graph(run):
    a = problem(b=2, l=300, h=4, p=64, g=1, n=64, dtype=torch.bfloat16, device="cuda", D="h")
    t = {k: v.clone().requires_grad_() for k, v in leaves(a).items()}

    def step(*values):
        y, *_ = run(**rebuilt(a, dict(zip(t, values, strict=True))))
        return y

    expected = torch.autograd.grad(step(*t.values()), list(t.values()), torch.ones_like(a["x"]))
    compiled = torch.compile(step, fullgraph=True)
    got = torch.autograd.grad(compiled(*t.values()), list(t.values()), torch.ones_like(a["x"]))
    for u, v in zip(got, expected, strict=True):
        assert torch.equal(u, v)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(step(*t.values()), list(t.values()), torch.ones_like(a["x"]))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(step(*t.values()), list(t.values()), torch.ones_like(a["x"]))
    graph.replay()
    torch.cuda.synchronize()
    for u, v in zip(captured, expected, strict=True):
        assert torch.equal(u, v)


def test_stack_of_24_layers():
    """Gradients of a deep residual stack stay finite, and near those of a float32 run."""
    torch.manual_seed(0)
    h, p, n, layers = 4, 32, 32, 24
    parameters = [
        problem(b=2, l=200, h=h, p=p, g=1, n=n, dtype=torch.float32, device="cuda", seed=s) for s in range(layers)
    ]

    def stack(x, dtype, backend):
        for q in parameters:
            f = q["forward"]
            u = torch.nn.functional.layer_norm(x, (p,)).to(dtype)
            y = bimamba_chunk_scan_combined(
                u, f.dt, f.A, f.B.to(dtype), f.C.to(dtype), dt_bias=f.dt_bias, dt_softplus=True, backend=backend
            )
            x = x + 0.3 * y.to(x.dtype)
        return x

    def gradient(dtype, backend):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(stack(leaf, dtype, backend).square().mean(), leaf)[0]

    x = torch.randn(2, 200, h, p, device="cuda")
    exact = gradient(torch.float32, "triton")
    assert_close({"dx": exact}, {"dx": gradient(torch.float64, "torch")}, 24 * BOUNDS[torch.float32])
    # bf16 inputs of every layer are rounded, whoever computes: the kernels may not add to what the PyTorch path, which
    # rounds nothing but its inputs and outputs, is off by
    got, unavoidable = gradient(torch.bfloat16, "triton"), gradient(torch.bfloat16, "torch")
    assert got.isfinite().all()
    assert_close({"dx": got}, {"dx": exact}, 1.5 * relative_error(unavoidable, exact))
