"""Convolution and gated norm: Triton (the interpreter without a GPU) against PyTorch, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from problems import relative_error

from bimamba.ops.conv1d import depthwise_conv1d
from bimamba.ops.gated_norm import rms_norm_gated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3} | ({torch.bfloat16: 6e-3} if DEVICE == "cuda" else {})


def compared(run, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """`run(backend, **tensors)` on both backends, the PyTorch one in float64: outputs and all gradients."""
    results = []
    for backend in ("triton", "torch"):
        wide = torch.float64 if backend == "torch" else dtype
        own = {
            k: v.to(wide if k in ("x", "y", "z") else v.dtype if wide == dtype else wide) for k, v in tensors.items()
        }
        own = {k: v.detach().requires_grad_() for k, v in own.items()}
        out = run(backend, **own)
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in out]
        grads = torch.autograd.grad(out, list(own.values()), cotangents)
        results.append(
            {f"out {i}": o for i, o in enumerate(out)} | dict(zip((f"d{k}" for k in own), grads, strict=True))
        )
    for name, value in results[0].items():
        assert value.isfinite().all(), name
        assert relative_error(value, results[1][name]) <= BOUNDS[dtype], name


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("dtype, causal", [*((dtype, False) for dtype in BOUNDS), (torch.float32, True)], ids=str)
@pytest.mark.parametrize(
    "width, options",
    [(2, {}), (3, dict(mask=True)), (7, dict(seq=True)), (9, dict(mask=True, seq=True)), (4, dict(activation="none"))],
    ids=str,
)
def test_conv1d(width, options, causal, dtype):
    b, l, split = 2, 71, (70, 16, 5)
    d = sum(split)
    mask = torch.arange(l, device=DEVICE).expand(b, l) < torch.tensor([[l], [50]], device=DEVICE)
    seq = (torch.arange(l, device=DEVICE) // 23).expand(b, l).contiguous()

    def run(backend, x, **parameters):
        return depthwise_conv1d(
            x,
            **parameters,
            causal=causal,
            mask=mask if options.get("mask") else None,
            seq_idx=seq if options.get("seq") else None,
            activation=options.get("activation", "silu"),
            split=split,
            backend=backend,
        )

    tensors = dict(x=draw(b, l, d).to(dtype), weight=draw(d, width, seed=1), bias=draw(d, seed=2))
    compared(run, tensors, dtype)


@pytest.mark.parametrize("width, causal", [(2, True), (7, False)])
def test_conv1d_of_long_sequences(width, causal):
    """Whole blocks within a sequence, a block that ends where one ends, and ids that fall and come back."""
    seq = torch.tensor([[5] * 128 + [2] * 64 + [5] * 23, [0] * 150 + [1] + [0] * 64], device=DEVICE)

    def run(backend, x, weight, bias):
        return depthwise_conv1d(x, weight, bias, causal=causal, seq_idx=seq, backend=backend)

    tensors = dict(x=draw(2, seq.shape[1], 8), weight=draw(8, width, seed=1), bias=draw(8, seed=2))
    compared(run, tensors, torch.float32)


def test_conv1d_of_a_slice_without_bias():
    """The block's own use: channels of a wider tensor, read where they lie."""
    x, weight = draw(2, 33, 50), draw(20, 7, seed=1)
    run = lambda backend, x, weight: depthwise_conv1d(x[..., 10:30], weight, backend=backend)  # noqa: E731
    compared(run, dict(x=x, weight=weight), torch.float32)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("before, group", [(True, None), (False, None), (False, 24), (True, 24)])
def test_gated_norm(before, group, gated, dtype):
    def run(backend, y, weight, z=None):
        return rms_norm_gated(y, z, weight, 1e-5, before, group, backend)

    tensors = dict(y=draw(2, 19, 72).to(dtype), weight=draw(72, seed=1))
    compared(run, tensors | (dict(z=draw(2, 19, 72, seed=2).to(dtype)) if gated else {}), dtype)


def test_gated_norm_of_a_slice():
    y, z, weight = draw(2, 19, 40), draw(2, 19, 100, seed=2), draw(40, seed=1)
    run = lambda backend, y, z, weight: rms_norm_gated(y, z[..., 30:70], weight, backend=backend)  # noqa: E731
    compared(run, dict(y=y, z=z, weight=weight), torch.float32)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_an_empty_batch(backend):
    """No rows out, and gradients of zero, as PyTorch's own operators give them."""

    def conv(x, weight, bias):
        return depthwise_conv1d(x, weight, bias, split=(16, 4), backend=backend)

    def norm(y, z, weight):
        return (rms_norm_gated(y, z, weight, group_size=10, backend=backend),)

    weight, bias = draw(20, 4), draw(20)
    for run, tensors in ((conv, (draw(0, 5, 20), weight, bias)), (norm, (draw(0, 5, 20), draw(0, 5, 20), bias))):
        own = [t.requires_grad_() for t in tensors]
        out = run(*own)
        assert [len(o) for o in out] == [0] * len(out)
        grads = torch.autograd.grad(out, own, [torch.ones_like(o) for o in out])
        for t, grad in zip(own, grads, strict=True):
            torch.testing.assert_close(grad, torch.zeros_like(t), rtol=0, atol=0)
    y = draw(2, 0, 20).requires_grad_()  # no rows either
    grads = torch.autograd.grad(norm(y, y, bias)[0].sum(), (y, bias))
    assert not any(grad.any() for grad in grads)


def test_opcheck():
    x, weight, bias = (t.requires_grad_() for t in (draw(1, 9, 20), draw(20, 3, seed=1), draw(20, seed=2)))
    mask = torch.ones(1, 9, dtype=torch.bool, device=DEVICE)
    from bimamba.ops.conv1d import binding  # noqa: F401
    from bimamba.ops.gated_norm import binding as _  # noqa: F401

    torch.library.opcheck(torch.ops.bimamba.conv1d.default, (x, weight, bias, mask, None, True, False, [16, 4]))
    args = (x, x.detach().clone().requires_grad_(), bias, 1e-5, True, 10, torch.bfloat16)
    torch.library.opcheck(torch.ops.bimamba.gated_norm.default, args)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, w: depthwise_conv1d(x[:, :0], w, backend="torch"), r"l at least 1, got \(1, 0, 4\)"),
        (lambda x, w: depthwise_conv1d(x[:, :0], w, backend="triton"), r"l at least 1, got \(1, 0, 4\)"),
        (lambda x, w: depthwise_conv1d(x, w, split=(3, 3)), "split: expected positive sizes that sum to d = 4"),
        (lambda x, w: depthwise_conv1d(x, w, mask=torch.ones(1, 5)), "mask: expected dtype bool"),
        (lambda x, w: depthwise_conv1d(x, w, seq_idx=torch.ones(1, 5)), "seq_idx: expected ints, got torch.float32"),
        (lambda x, w: depthwise_conv1d(x, w, bias=torch.ones(3)), "bias: expected shape"),
        (lambda x, w: depthwise_conv1d(x, w, backend="fast"), "backend: expected one of"),
        (lambda x, w: depthwise_conv1d(x, torch.ones(4, 40), backend="triton"), "widths up to 9, got 40"),
        (lambda x, w: depthwise_conv1d(x, w.to("meta")), "weight: expected the device of x"),
        (lambda x, w: rms_norm_gated(x, x.to("meta"), torch.ones(4)), "z: expected the device of y"),
        (lambda x, w: rms_norm_gated(x, x[..., :2], torch.ones(4)), "z: expected the shape of y"),
        (lambda x, w: rms_norm_gated(x, x, torch.ones(3)), "weight: expected shape"),
        (lambda x, w: rms_norm_gated(x, x, torch.ones(4), group_size=3), "group_size: expected a divisor of 4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(1, 5, 4), torch.ones(4, 3))


def test_norm_in_another_dtype():
    y, weight = draw(3, 5, 16), draw(16, seed=1)
    got = rms_norm_gated(y, None, weight, backend="triton", dtype=torch.float16)
    expected = rms_norm_gated(y, None, weight, backend="torch")
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), expected, rtol=1e-3, atol=1e-3)
    y.requires_grad_()
    dy = torch.autograd.grad(rms_norm_gated(y, None, weight, backend="triton", dtype=torch.float16).float().sum(), y)[0]
    expected = torch.autograd.grad(rms_norm_gated(y, None, weight, backend="torch").sum(), y)[0]
    assert dy.dtype == torch.float32
    torch.testing.assert_close(dy, expected, rtol=1e-5, atol=1e-5)
