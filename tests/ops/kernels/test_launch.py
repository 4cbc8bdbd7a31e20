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
    assert not module._calls  # the launcher is none of Triton's


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


class Driver:
    """In the place of Triton's functions in C: notes launches, and the descriptors that are encoded."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.encoded: list[tuple] = []

    def __call__(self, *values):
        self.launches.append(values)

    def encode(self, *values):
        self.encoded.append(values)
        return values  # the same for the same


class Launched(Kernel):
    """Compiled to functions 1, 2, ..., which run by Triton's own launcher."""

    def __init__(self, launcher) -> None:
        super().__init__()
        self.launcher = launcher

    def __getitem__(self, grid):
        def compiled(**arguments):
            self.by_triton.append(arguments)
            return SimpleNamespace(run=self.launcher, function=len(self.by_triton), packed_metadata=(4, 1))

        return compiled


@pytest.fixture
def driver(monkeypatch):
    nvidia = pytest.importorskip("triton.backends.nvidia.driver")
    driver = Driver()
    utils = SimpleNamespace(launch=driver, fill_tma_descriptor=driver.encode, fill_tma_descriptor_tiled=driver.encode)
    active = SimpleNamespace(utils=utils, map_python_to_cpp_type=nvidia.ty_to_cpp, get_current_device=lambda: 0)
    monkeypatch.setattr(module.triton.runtime.driver, "_active", active)
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: SimpleNamespace(launch=driver), raising=False)
    monkeypatch.setattr(nvidia, "library_dirs", list, raising=False)
    for made_in_c in ("annotate_arguments", "make_kernel_signature"):
        monkeypatch.setattr(nvidia, made_in_c, tuple, raising=False)
    return driver


def triton_launcher(x: str = "tensordesc<bf16[2,8]>"):
    from triton.backends.nvidia.driver import CudaLauncher

    meta = dict(swizzle=3, elem_size=2, elem_type=10, block_size=[2, 8], fp4_padded=False)
    meta = [meta] if "tensordesc" in x else []
    metadata = SimpleNamespace(tensordesc_meta=meta, num_ctas=1, launch_cooperative_grid=False, launch_pdl=False)
    for kind in ("global", "profile"):
        setattr(metadata, f"{kind}_scratch_size", 0)
        setattr(metadata, f"{kind}_scratch_align", 1)
    signature = {"x": x, "out": "*bf16", "L": "i32", "Q": "constexpr"}
    names = SimpleNamespace(arg_names=list(signature))
    return CudaLauncher(SimpleNamespace(constants={"Q": 16}, signature=signature, fn=names), metadata)


TILES = {"x": Tiles([4, 8], [8, 1], [2, 8])}


def same_launch(driver: Driver, launcher, stream, function: int, x, out, length: int = 5) -> bool:
    """Whether the last launch is what Triton's launcher makes of these."""
    given = (3, 1, 1, stream, function, (4, 1), None, None, None)
    launcher(*given, x, out.data_ptr(), length, 16)
    by_launch, by_triton = driver.launches[-2:]
    return by_launch == by_triton


@pytest.mark.parametrize("described", [True, False])
def test_the_drivers_call_is_kept(described, driver, stand_ins):
    launcher = triton_launcher(*[] if described else ["*bf16"])
    kernel = Launched(launcher)
    stand_ins.get_current_stream = lambda index: stream
    kept = launch(kernel, tiles=TILES if described else {})
    first, second = (torch.zeros(4, 8, dtype=torch.bfloat16) for _ in range(2))
    stream = 0
    kept(x=first, out=first)  # compiled here
    for x, stream in ((first, 0), (second, 0), (first, 0), (first, 5), (second, 0)):
        kept(x=x, out=first)
        assert same_launch(driver, launcher, stream, 1, TILES["x"].of(x) if described else x.data_ptr(), first)
    assert len(module._calls) == 3 and len(kernel.by_triton) == 1
    assert len(driver.encoded) == (5 + 3 if described else 0)  # Triton's own, and one for each stream and address


def test_what_differs_beside_the_address_is_another_call(driver):
    launcher = triton_launcher()
    kernel, x = Launched(launcher), torch.zeros(4, 8, dtype=torch.bfloat16)
    short, long = launch(kernel, tiles=TILES), launch(kernel, 7, tiles=TILES)
    for _ in range(3):
        short(x=x, out=x)
    assert same_launch(driver, launcher, "stream 0", 1, TILES["x"].of(x), x)
    long(x=x, out=x)
    assert same_launch(driver, launcher, "stream 0", 1, TILES["x"].of(x), x, length=7)
    for _ in range(2):  # compiled, then launched
        short(x=x.view(torch.float16), out=x)
    assert driver.launches[-1][4] == 2


def test_watchers_see_launches_whose_call_is_kept(driver, monkeypatch):
    kernel, x = Launched(triton_launcher()), torch.zeros(4, 8, dtype=torch.bfloat16)
    kept = launch(kernel, tiles=TILES)
    for _ in range(2):
        kept(x=x, out=x)
    monkeypatch.setattr(module, "_watched", lambda: True)
    kept(x=x, out=x)
    assert len(module._calls) == 1 and len(kernel.by_triton) == 2 and len(driver.launches) == 1


def test_calls_hold_their_kernel_and_no_tensor(driver):
    """Triton unloads a kernel's code when it is dropped."""

    def inside(values):
        for v in values:
            yield from inside(v) if isinstance(v, (tuple, list)) else [v]

    kernel, x = Launched(triton_launcher()), torch.zeros(4, 8, dtype=torch.bfloat16)
    kept = launch(kernel, tiles=TILES)
    for _ in range(2):
        kept(x=x, out=x)
    ((_, arguments, compiled),) = module._calls.values()
    assert compiled.function == 1
    assert not [v for v in inside(arguments) if torch.is_tensor(v) or hasattr(v, "base")]


def test_calls_do_not_pile_up(driver, monkeypatch):
    monkeypatch.setattr(module, "CALLS", 4)
    kernel, x = Launched(triton_launcher()), torch.zeros(64, 8, dtype=torch.bfloat16)
    kept = launch(kernel, tiles=TILES)
    for i in range(11):
        kept(x=x[4 * i :], out=x)
    assert len(module._calls) == 2 and len(driver.launches) == 10


def test_launchers_that_are_left_to_triton(driver, monkeypatch):
    run, x = triton_launcher(), torch.zeros(4, 8, dtype=torch.bfloat16)
    given = (3, 1, 1, 0, 7, (4, 1), None, None, None, TILES["x"].of(x), x.data_ptr(), 5, 16)
    assert module._call_of(run, given)[0] is driver
    for name, value in (("global_scratch_size", 128), ("profile_scratch_size", 128), ("gsan_enabled", True)):
        with monkeypatch.context() as patch:
            patch.setattr(run, name, value, raising=False)
            assert module._call_of(run, given) == (run, given), name
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")
        assert module._call_of(run, given) == (run, given)

    class Other:
        global_scratch_size = profile_scratch_size = 0

        def __init__(self, launch):
            self.launch = launch

        def __call__(self, *values):
            driver(*values)

    for other in (Other(lambda *values: None), Other(driver), SimpleNamespace(launch=driver), SimpleNamespace()):
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
    assert len(kernel.by_triton) == 2 and not kernel.direct and not module._calls


def test_bad_arguments():
    with pytest.raises(TypeError, match="list L in do_not_specialize"):
        launch(Kernel(do_not_specialize=False))
    for tensors in ({"out": torch.zeros(8), "x": torch.zeros(8)}, {"x": torch.zeros(8)}):
        with pytest.raises(TypeError, match="expected x, out"):
            launch(Kernel())(**tensors)
