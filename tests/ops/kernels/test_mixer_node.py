"""The block as one node on the kernels, with what it needs kept or recomputed (`use_mem_eff_path`), gives what its
parts give, outputs and all gradients."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from problems import relative_error

from bimamba.nn import BiMamba2, Mamba2
from bimamba.ops.backend import choose_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
L = 37


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("BIMAMBA_BACKEND", "triton")


@contextlib.contextmanager
def as_parts():
    with mock.patch("bimamba.nn.mamba2._Mamba2._is_one_node", lambda *_: False):
        yield


def results(module, u, mask, seq_idx, recompute):
    module.use_mem_eff_path = recompute
    module.zero_grad()
    leaf = u.clone().requires_grad_()
    out = module(leaf, mask, seq_idx)
    if mask is not None:
        out = out.masked_fill(~mask[..., None], 0.0)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out))
    grads = {f"d {name}": p.grad.clone() for name, p in module.named_parameters()}
    return {"out": out.detach(), "du": leaf.grad, **grads}


@pytest.mark.parametrize(
    "kind, options",
    [
        (BiMamba2, {}),
        (BiMamba2, dict(tied=False, bias=True, mask=True)),
        (BiMamba2, dict(shift=True, seq=True, norm_before_gate=False)),
        (BiMamba2, dict(ngroups=2, headdim=8, conv_bias=False, activation="none", dt_limit=(0.001, 0.1))),
        (Mamba2, dict(mask=True, seq=True)),
    ],
    ids=str,
)
def test_node_equals_parts(kind, options):
    torch.manual_seed(0)
    options = dict(options)
    with_mask, with_seq = options.pop("mask", False), options.pop("seq", False)
    module = kind(16, **{"d_state": 8, "headdim": 16, **options}).to(DEVICE)
    u = torch.randn(2, L, 16, device=DEVICE)
    mask = (torch.arange(L, device=DEVICE) < torch.tensor([[L], [20]], device=DEVICE)) if with_mask else None
    seq_idx = (torch.arange(L, device=DEVICE) // 15).expand(2, L).contiguous() if with_seq else None
    assert module._is_one_node(u, mask) and module._projects_plainly(u)
    with as_parts():
        expected = results(module, u, mask, seq_idx, recompute=False)
    for recompute in (False, True):
        got = results(module, u, mask, seq_idx, recompute)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert relative_error(got[name], value) < 2e-6, name
    with torch.no_grad():
        out = module(u, mask, seq_idx)
    assert relative_error(out if mask is None else out.masked_fill(~mask[..., None], 0.0), expected["out"]) < 2e-6


def test_what_the_node_cannot_do_is_checkpointed():
    """Learned initial states, and a least step size beside padding: the same results another way."""
    torch.manual_seed(0)
    mask = torch.arange(L, device=DEVICE) < torch.tensor([[L], [20]], device=DEVICE)
    for module in (
        BiMamba2(16, d_state=8, headdim=16, learnable_init_states=True),
        BiMamba2(16, d_state=8, headdim=16, dt_limit=(0.01, 0.1)),
    ):
        module = module.to(DEVICE)
        u = torch.randn(2, L, 16, device=DEVICE)
        assert not module._is_one_node(u, mask)
        expected, got = (results(module, u, mask, None, recompute) for recompute in (False, True))
        for name, value in expected.items():
            assert relative_error(got[name], value) < 2e-6, name


@pytest.mark.parametrize("recompute", [False, True])
def test_an_empty_batch_is_refused(recompute):
    module = BiMamba2(16, d_state=8, headdim=16, use_mem_eff_path=recompute).to(DEVICE)
    with pytest.raises(ValueError, match=r"^u: expected \(b, l, d_model\) with no empty dimension"):
        module(torch.randn(0, L, 16, device=DEVICE))


def test_node_under_autocast():
    torch.manual_seed(0)
    module = BiMamba2(16, d_state=8, headdim=16).to(DEVICE)
    u = torch.randn(2, L, 16, device=DEVICE)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter's bf16 products are not reliable
    with torch.autocast(DEVICE, dtype=dtype):
        both = [results(module, u, None, None, recompute) for recompute in (False, True)]
        with as_parts():
            expected = results(module, u, None, None, recompute=False)
    for got in both:
        assert got["out"].dtype == dtype
        for name, value in expected.items():
            assert value.dtype == got[name].dtype, name
            assert relative_error(got[name], value) < (2e-2 if DEVICE == "cuda" else 3e-3), name


def test_modules_with_listeners_are_called():
    """An adapter in place of a projection, or a hook on the norm, must not be passed by."""

    class Doubled(torch.nn.Linear):
        def forward(self, u):
            return 2 * super().forward(u)

    module, u = BiMamba2(16, d_state=8, headdim=16).to(DEVICE), torch.randn(1, 9, 16, device=DEVICE)
    plain = module(u)
    seen = []
    handle = module.norm.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(module(u), plain, atol=1e-6) and seen
    handle.remove()
    for name in ("out_proj", "in_proj"):
        own = getattr(module, name)
        adapter = Doubled(own.in_features, own.out_features, bias=False).to(DEVICE)
        adapter.load_state_dict(own.state_dict())
        setattr(module, name, adapter)
        both = [module(u) for module.use_mem_eff_path in (False, True)]
        assert torch.allclose(*both, atol=1e-6)
        if name == "out_proj":
            assert torch.allclose(both[0], 2 * plain, atol=1e-6)
            module.out_proj = own
        else:
            assert not torch.allclose(both[0], plain, atol=1e-2)
    assert seen == [1]


def test_dtypes_that_do_not_fit_are_refused():
    """As `nn.Linear` refuses them: not cast without a word."""
    module = BiMamba2(16, d_state=8, headdim=16).to(DEVICE)
    for module.use_mem_eff_path in (False, True):
        with pytest.raises(RuntimeError, match="dtype"):
            module(torch.randn(1, 9, 16, device=DEVICE, dtype=torch.float16))


@pytest.mark.parametrize("recompute, tied", [(False, False), (False, True), (True, True)])
def test_operator(recompute, tied):
    """PyTorch's own checks of schema, fakes and autograd registration; compiled without a graph break."""
    torch.manual_seed(0)
    module = BiMamba2(16, d_state=8, headdim=16, tied=tied, use_mem_eff_path=recompute).to(DEVICE)
    calls = []

    def seen(operator, function, direct, *args):
        calls.append((operator, args))
        return operator(*args)

    u = torch.randn(2, 9, 16, device=DEVICE)
    with mock.patch("bimamba.ops.mixer.enter", seen):
        module(u)
    ((operator, args),) = calls
    args = tuple(a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args)
    torch.library.opcheck(operator, args)
    expected = results(module, u, None, None, recompute)
    torch._dynamo.reset()
    module.compile(fullgraph=True, backend="aot_eager")
    untraceable = torch._dynamo.disable(torch.amp.is_autocast_available)  # as it is for torch 2.11
    with mock.patch("torch.amp.is_autocast_available", untraceable):
        got = results(module, u, None, None, recompute)
    for name, value in expected.items():
        assert relative_error(got[name], value) < 2e-6, name


@pytest.mark.parametrize("adapted", [False, True])
def test_nothing_but_the_input_is_kept(adapted):
    """By the node, and where a projection is not one that it may take."""
    module = BiMamba2(16, d_state=8, headdim=16, use_mem_eff_path=True).to(DEVICE)
    if adapted:
        module.in_proj.register_forward_hook(lambda *_: None)
    u = torch.randn(2, L, 16, device=DEVICE, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(u)
    own = {p.data_ptr() for p in module.parameters()}
    activations = {t.data_ptr() for t in kept if t.dim() >= 3} - own  # a weight may be kept cast or padded
    assert activations <= {u.data_ptr()}


def test_single_tokens():
    """A dimension of size 1 may have any stride."""
    torch.manual_seed(0)
    layer = BiMamba2(16, headdim=16, d_state=8).to(DEVICE)
    projected = torch.randn(3, 1, layer.in_proj.out_features, device=DEVICE)
    odd = projected.as_strided(projected.shape, (projected.shape[2], 12345, 1))
    assert odd.is_contiguous() and odd.stride() != projected.stride()
    results = []
    for t in (projected, odd):
        leaf = t.detach().requires_grad_()
        y = layer._as_one_node(leaf, None, None)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()], allow_unused=True)))
    for own, other in zip(*results, strict=True):
        assert own is other is None or torch.equal(own, other)


def test_columns_behind_the_projection_change_nothing():
    """On GPUs the projection is padded to whole rows of 16 bytes."""
    torch.manual_seed(0)
    layer = BiMamba2(16, headdim=16, d_state=8).to(DEVICE)
    projected = torch.randn(2, 9, layer.in_proj.out_features, device=DEVICE, requires_grad=True)
    padded = torch.nn.functional.pad(projected.detach(), (0, 4), value=7.0).requires_grad_()
    for path in (layer._as_one_node, layer._after_projection):
        y, again = path(projected, None, None), path(padded, None, None)
        assert torch.equal(y, again)
        (own,), (other,) = (torch.autograd.grad(t.square().sum(), p) for t, p in ((y, projected), (again, padded)))
        assert torch.equal(own, other[..., :-4]) and not other[..., -4:].any()
    u = torch.randn(2, 9, 16, device=DEVICE)
    expected = results(layer, u, None, None, recompute=True)
    more = lambda u, weight, bias: (torch.nn.functional.pad(weight, (0, 0, 0, 4)), bias)  # noqa: E731
    with mock.patch("bimamba.nn.mamba2.aligned", more):
        got = results(layer, u, None, None, recompute=True)
    for name, value in expected.items():
        assert relative_error(got[name], value) < 2e-6, name


@pytest.mark.parametrize(("node", "recompute"), [(True, False), (True, True), (False, False)])
def test_second_derivatives_are_refused(node, recompute):
    """By the node, and by the operators that it is made of: without a word they would be taken for zero."""
    module = BiMamba2(16, d_state=8, headdim=16, use_mem_eff_path=recompute).to(DEVICE)
    u = torch.randn(1, 9, 16, device=DEVICE, requires_grad=True)
    with contextlib.nullcontext() if node else as_parts():
        (grad,) = torch.autograd.grad(module(u).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    ("transform", "served"),
    [
        (torch.func.grad, True),
        (torch.func.vmap, False),
        (lambda f: torch.func.grad(torch.func.grad(f)), False),
        (lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), False),
    ],
    ids=["grad", "vmap", "second derivative", "jvp"],
)
def test_transforms_that_the_kernels_do_not_have(monkeypatch, transform, served):
    """Taken by the PyTorch path, unless the kernels were demanded."""
    monkeypatch.setattr("bimamba.ops.backend._said", set())
    x = torch.tensor([0.5, 1.0] if transform is torch.func.vmap else 0.5)

    def f(t, backend="auto"):
        meta = mock.Mock(device=torch.device("cuda"))  # where "auto" is the kernels
        with mock.patch("bimamba.ops.backend.triton_unavailable", lambda _: None):
            monkeypatch.delenv("BIMAMBA_BACKEND", raising=False)
            chosen.append(choose_backend(meta, backend, ("auto", "triton", "torch"), lambda: None))
        return t.sin()

    chosen = []
    with (
        contextlib.nullcontext() if served else pytest.warns(UserWarning, match="PyTorch path on cuda: .*torch.func's")
    ):
        transform(f)(x)
    assert chosen[-1] == ("triton" if served else "torch")
    if not served:
        with pytest.raises(ValueError, match="'triton' was demanded, but the kernels have first derivatives"):
            transform(lambda t: f(t, "triton"))(x)
