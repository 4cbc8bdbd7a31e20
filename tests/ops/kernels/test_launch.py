"""A launch that is kept: what it may reuse from call to call, and what not. The driver and Triton are stand-ins."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from bimamba.ops import launch as module
from bimamba.ops.launch import Launch, Tiles

DEVICE = torch.device("cuda", 0)


class Kernel:
    """Takes tensors x and out, an integer L and a constant Q; notes what Triton and what the driver were handed."""

    __name__ = "kernel"
    arg_names = ("x", "out", "L", "Q")

    def __init__(self, do_not_specialize: bool = True) -> None:
        self.params = [
            SimpleNamespace(name=n, is_constexpr=n == "Q", do_not_specialize=n == "L" and do_not_specialize)
            for n in self.arg_names
        ]
        self.by_triton: list[dict] = []
        self.direct: list[tuple] = []

    def __getitem__(self, grid):
        def compiled(**arguments):
            self.by_triton.append(arguments)
            return SimpleNamespace(run=lambda *a: self.direct.append(a), function="f", packed_metadata="m")

        return compiled


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda index: f"stream {index}")
    monkeypatch.setattr(module, "JITFunction", Kernel)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(module, "_compiled", {})
    return active


def launch(kernel: Kernel, length: int = 5, q: int = 16, **options) -> Launch:
    return Launch(kernel, 3, DEVICE, L=length, Q=q, num_warps=4, **options)


def test_second_call_goes_past_triton():
    kernel = Kernel()
    once = launch(kernel)
    first, second = torch.zeros(8), torch.ones(8)
    once(x=first, out=first)
    once(x=second, out=None)
    once(x=second, out=first)
    assert [sorted(a) for a in kernel.by_triton] == [["L", "Q", "num_warps", "out", "x"]] * 2  # out=None is another
    address = (second.data_ptr(), first.data_ptr())
    assert kernel.direct == [(3, 1, 1, "stream 0", "f", "m", None, None, None, *address, 5, 16)]


def test_other_dtypes_and_alignments_are_compiled_anew():
    kernel = Kernel()
    once, aligned = launch(kernel), torch.zeros(64)
    for x in (aligned, aligned.bfloat16(), aligned[1:], aligned):
        once(x=x, out=aligned)
    once(x=aligned, out=aligned[1:])
    assert len(kernel.by_triton) == 4 and len(kernel.direct) == 1


def test_lengths_share_what_was_compiled_and_constants_do_not():
    kernel, other, x = Kernel(), Kernel(), torch.zeros(8)
    for kept in (launch(kernel, 5), launch(kernel, 7), launch(kernel, 5, q=32), launch(kernel, 2**31), launch(other)):
        kept(x=x, out=x)
    assert len(kernel.by_triton) == 3 and [a[-2:] for a in kernel.direct] == [(7, 16)]
    assert len(other.by_triton) == 1


def test_descriptors_are_of_the_tensor_of_the_call():
    kernel = Kernel()
    kept = launch(kernel, tiles={"x": Tiles([4, 8], [8, 1], [2, 8])})
    first, second = torch.zeros(4, 8), torch.ones(4, 8)
    for x in (first, second):
        kept(x=x, out=first)
    assert kernel.by_triton[0]["x"].base is first
    descriptor = kernel.direct[0][-4]
    assert descriptor.base is second and descriptor.block_shape == [2, 8] and descriptor.padding == "zero"
    launch(kernel, tiles={"x": Tiles([4, 8], [8, 1], [4, 8])})(x=first, out=first)
    assert len(kernel.by_triton) == 2  # blocks are compiled for


def test_a_device_that_is_not_current(stand_ins, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def device(index):
        seen.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    stand_ins.get_current_device = lambda: 1
    launch(Kernel())(x=torch.zeros(8), out=torch.zeros(8))
    assert seen == [0]


def test_watchers_see_launches(monkeypatch):
    kernel, x = Kernel(), torch.zeros(8)
    kept = launch(kernel)
    kept(x=x, out=x)
    monkeypatch.setattr(module, "_watched", lambda: True)
    kept(x=x, out=x)
    assert len(kernel.by_triton) == 2 and not kernel.direct


def test_bad_arguments():
    with pytest.raises(TypeError, match="list L in do_not_specialize"):
        launch(Kernel(do_not_specialize=False))
    for tensors in ({"out": torch.zeros(8), "x": torch.zeros(8)}, {"x": torch.zeros(8)}):
        with pytest.raises(TypeError, match="expected x, out"):
            launch(Kernel())(**tensors)
