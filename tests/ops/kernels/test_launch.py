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
    monkeypatch.setattr(module, "_calls", {})
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
    given = ["L", "Q", "enable_fp_fusion", "num_warps", "out", "x"]
    assert [sorted(a) for a in kernel.by_triton] == [given] * 2  # out=None is another
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


@pytest.fixture
def launcher(monkeypatch):
    """Triton's own launcher of a kernel with x by descriptor, above a driver that notes its calls; and those notes."""
    nvidia = pytest.importorskip("triton.backends.nvidia.driver")
    calls, encoded = [], []

    def encode(*values):
        encoded.append(values)
        return values  # the same for the same

    def call(*values):
        calls.append(values)

    utils = SimpleNamespace(launch=call, fill_tma_descriptor=encode, fill_tma_descriptor_tiled=encode)
    active = SimpleNamespace(utils=utils, map_python_to_cpp_type=nvidia.ty_to_cpp, get_current_device=lambda: 0)
    monkeypatch.setattr(module.triton.runtime.driver, "_active", active)
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: SimpleNamespace(launch=call), raising=False)
    monkeypatch.setattr(nvidia, "library_dirs", list, raising=False)
    for made_in_c in ("annotate_arguments", "make_kernel_signature"):
        monkeypatch.setattr(nvidia, made_in_c, tuple, raising=False)
    meta = dict(swizzle=3, elem_size=2, elem_type=10, block_size=[2, 8], fp4_padded=False)
    metadata = SimpleNamespace(tensordesc_meta=[meta], num_ctas=1, launch_cooperative_grid=False, launch_pdl=False)
    for kind in ("global", "profile"):
        setattr(metadata, f"{kind}_scratch_size", 0)
        setattr(metadata, f"{kind}_scratch_align", 1)
    signature = {"x": "tensordesc<bf16[2,8]>", "out": "*bf16", "L": "i32", "Q": "constexpr"}
    names = SimpleNamespace(arg_names=list(signature))
    source = SimpleNamespace(constants={"Q": 16}, signature=signature, fn=names)
    return nvidia.CudaLauncher(source, metadata), calls, encoded


class Launched(Kernel):
    """Compiled to what runs by `launcher`."""

    launcher = None

    def __getitem__(self, grid):
        def compiled(**arguments):
            return SimpleNamespace(run=self.launcher, function=7, packed_metadata=(4, 1))

        return compiled


def test_the_drivers_call_is_kept(launcher, stand_ins):
    kernel, calls, encoded = Launched(), *launcher[1:]
    kernel.launcher = launcher[0]
    stand_ins.get_current_stream = lambda index: stream
    kept = launch(kernel, tiles={"x": Tiles([4, 8], [8, 1], [2, 8])})
    first, second = (torch.zeros(4, 8, dtype=torch.bfloat16) for _ in range(2))
    stream = 0
    kept(x=first, out=first)  # compiled here
    for x, stream in ((first, 0), (second, 0), (first, 0), (first, 5), (second, 0)):
        kept(x=x, out=first)
        given = (3, 1, 1, stream, 7, (4, 1), None, None, None)
        launcher[0](*given, kept.tiles["x"].of(x), first.data_ptr(), 5, 16)
        by_launch, by_triton = calls[-2:]
        assert by_launch == by_triton and by_launch[3] == stream
    assert len(encoded) == 5 + 3  # Triton's own, and one for each stream and address


def test_calls_do_not_pile_up(launcher, monkeypatch):
    monkeypatch.setattr(module, "CALLS", 4)
    kernel, x = Launched(), torch.zeros(64, 8, dtype=torch.bfloat16)
    kernel.launcher = launcher[0]
    kept = launch(kernel, tiles={"x": Tiles([4, 8], [8, 1], [2, 8])})
    for i in range(11):
        kept(x=x[4 * i :], out=x)
    assert len(module._calls) == 2 and len(launcher[1]) == 10
    assert not any(torch.is_tensor(v) for call in module._calls.values() for v in call[1])


def test_a_launcher_that_wants_memory_is_left_to_triton(launcher):
    run, calls, _ = launcher
    x = torch.zeros(4, 8, dtype=torch.bfloat16)
    descriptor = Tiles([4, 8], [8, 1], [2, 8]).of(x)
    given = (3, 1, 1, 0, 7, (4, 1), None, None, None, descriptor, x.data_ptr(), 5, 16)
    assert module._call_of(run, given)[0] is not run
    run.global_scratch_size = 128
    assert module._call_of(run, given) == (run, given)
    other = SimpleNamespace(global_scratch_size=0, profile_scratch_size=0, launch=lambda *a: calls)
    assert module._call_of(other, given) == (other, given)


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
