"""task.compile: one graph, few of them whatever the shapes, the same losses; a clear word where no compiler is."""

import shutil
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from runs import QUIET
from torch._dynamo.testing import CompileCounterWithBackend

from bimamba.data.collate import pack_rows
from bimamba.models import Classifier
from bimamba.nn import BiMamba2, ClassTokenPooling, MeanPooling
from bimamba.ops.backend import choose_backend
from bimamba.packing import Packing
from bimamba.spec import DataSpec
from bimamba.tasks import SupervisedTask
from bimamba.tasks.compilation import compile_network

DNA = DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=400)


def network(pooling=MeanPooling, **options):
    torch.manual_seed(0)
    mixer = partial(BiMamba2, headdim=8, d_state=4, **options)
    return Classifier(DNA, 16, 1, mixer=mixer, pooling=pooling)


def counted(net, backend="eager", **options):
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compile_network(net, backend=counter, **options)
    return counter


def padded(b, l, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(l // 2, l, (b, 1), generator=generator)
    mask = torch.arange(l) <= lengths
    return torch.randint(1, 6, (b, l), generator=generator) * mask, mask


def packed(n, l, seed=0):
    lengths = torch.from_numpy(np.random.default_rng(seed).integers(5, l, n))
    flat = torch.arange(int(lengths.sum())) % 5 + 1
    inputs, mask, packing = pack_rows(flat, lengths.cumsum(0) - lengths, lengths, 3 * l, pad_to_multiple=16)
    return inputs, mask, *packing


def test_a_compiled_network_may_fall_back_to_pytorch():
    """With its warning, once, and no break of the graph: a GPU that the kernels do not know."""

    def backend(x):
        return x if choose_backend(x, "auto", ("auto", "triton", "torch"), lambda: "a test") == "torch" else None

    torch.compiler.reset()
    compiled = torch.compile(backend, backend="eager", fullgraph=True, dynamic=False)
    with pytest.warns(UserWarning, match="runs its PyTorch path on meta: a test") as warned:
        for size in (2, 3):
            assert compiled(torch.empty(size, device="meta")) is not None
    assert len(warned) == 1


@pytest.mark.parametrize(("mode", "refused"), [("reduce-overhead", True), ("max-autotune-no-cudagraphs", False)])
def test_what_cuda_graphs_cannot_bear(mode, refused):
    task = SupervisedTask(network(), DNA, torch.optim.AdamW, compile=True, compile_options={"mode": mode})
    task._trainer = SimpleNamespace(  # of a GPU, which is not here
        accumulate_grad_batches=2, strategy=SimpleNamespace(root_device=torch.device("cuda"))
    )
    expected = pytest.raises(ValueError, match=r"no-cudagraphs with trainer\.accumulate_grad_batches=2")
    with expected if refused else nullcontext():
        task.setup("fit")
    task.setup("test")


def test_steps_of_one_shape_share_one_graph():
    net, plain = network(), network()
    counter = counted(net, backend="aot_eager")
    for seed in range(3):
        inputs = padded(4, 60, seed)
        results = []
        for model in (net, plain):
            logits = model(*inputs)
            results.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1  # fullgraph=True: a break would have raised


@pytest.mark.parametrize("make", [padded, packed])
def test_other_batch_sizes_and_lengths_do_not_compile_again(make):
    """On CPUs a length that is a multiple of the chunk has a graph of its own: nothing needs to be padded."""
    net = network(MeanPooling if make is packed else ClassTokenPooling).eval()
    counter = counted(net, dynamic=True)
    with torch.no_grad():
        net(*make(4, 150))
        for b, l in ((7, 210), (3, 163), (8, 333), (6, 286)):
            logits = net(*make(b, l))
        plain = network(type(net.pooling)).eval()
        torch.testing.assert_close(logits, plain(*make(6, 286)), atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler")
def test_inductor_trains_at_lengths_that_it_does_not_know():
    torch.compiler.reset()
    net, plain = network(), network()
    compile_network(net, dynamic=True)
    for l in (40, 53):
        inputs = padded(2, l)
        for model in (net, plain):
            model.zero_grad()
            model(*inputs).sum().backward()
        for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def fit(tmp_path, backend="inductor", **options):
    """Losses of five steps through the Trainer."""
    torch.compiler.reset()
    rows = [dict(zip(("inputs", "mask"), padded(4, 30, s), strict=True)) for s in range(5)]
    rows = [row | {"label": torch.tensor([0, 1, 1, 0]), "id": list("abcd")} for row in rows]
    task = SupervisedTask(
        network(), DNA, partial(torch.optim.SGD, lr=0.1), compile_options={"backend": backend}, **options
    )
    losses = []
    task.on_train_batch_end = lambda outputs, *_: losses.append(float(outputs["loss"]))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        **QUIET,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, torch.utils.data.DataLoader(rows, batch_size=None), weights_only=True)
    return losses


def test_losses_are_those_of_eager(tmp_path):
    losses = fit(tmp_path, "aot_eager", compile=True)
    assert len(losses) == 5 and losses == pytest.approx(fit(tmp_path), rel=1e-5)


@pytest.mark.slow
def test_losses_are_those_of_eager_with_inductor(tmp_path):
    assert fit(tmp_path, compile=True) == pytest.approx(fit(tmp_path), rel=1e-4)


def test_clear_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"compile_options\.mode: expected null or one of default, .* got 'fast'"):
        compile_network(network(), mode="fast")
    with pytest.raises(ValueError, match="expected null with backend='eager'"):
        compile_network(network(), mode="reduce-overhead", backend="eager")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"task\.compile=true: expected a C\+\+ compiler .* found none"):
        SupervisedTask(network(), DNA, partial(torch.optim.SGD, lr=0.1), compile=True)
    assert Packing._fields == ("seq_idx", "bounds", "order")  # the order of the network's arguments
