"""Launches of Triton kernels that the host hardly feels.

`kernel[grid](...)` looks at every argument anew, builds text from them and finds the compiled kernel under that text:
about 40 us a launch on an H100's host for kernels with 40 arguments. Most arguments follow from the problem's form and
are the same in every call: a `Launch` is made once for them and takes the tensors, of which the compiled kernel depends
on no more than dtype and alignment. PyTorch's allocator hands out the same addresses step after step: what a launch
passes to the driver, descriptors included, is kept for them.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# For a launch, or what else follows from sizes and flags alone. A new length costs 0.3 ms and keeps 27 kB for all the
# launches of a block (measured on a CPU), so thousands of lengths do not stay.
once_a_form = functools.lru_cache(maxsize=512)


def ceil_div(a: int, b: int) -> int:
    """`triton.cdiv` without its 5 us: that one serves kernels, too."""
    return -(-a // b)


def row_stride(t: Tensor) -> int:
    """The distance of the rows of `(..., d)`, which lie at one. The stride of a dimension of size 1 means nothing."""
    for size, stride in zip(t.shape[-2::-1], t.stride()[-2::-1], strict=True):
        if size > 1:
            return stride
    return t.shape[-1]


class Tiles(NamedTuple):
    """A contiguous tensor seen as `shape` and cut into blocks: what Hopper's copy engine fetches without a mask or an
    address register. Addresses must be multiples of 16 bytes."""

    shape: list[int]
    strides: list[int]
    block: list[int]

    def of(self, base: Tensor) -> TensorDescriptor:
        """`TensorDescriptor(...)` without its checks, which cost the host 5 us for each of the 25 descriptors of a
        step: `choose.py` sees to the shapes, `binding.py` to the alignment."""
        made = object.__new__(TensorDescriptor)
        made.base, made.shape, made.strides, made.block_shape = base, self.shape, self.strides, self.block
        return made


class Launch:
    """`kernel[(programs,)](**tensors, **settings)` on `device`, whichever is the current one; called with the tensors.

    Args:
        tiles: which of the tensors are handed over as descriptors.
        settings: the kernel's other arguments and options. A kernel takes its tensors first, and integers must be
            constexpr or listed in `do_not_specialize`: their values are not looked at.

    A launch is made once for a form and kept (`once_a_form`). It holds no tensor. That tensors are on `device` is for
    callers to see to (`backend.expect_device`): addresses do not tell.
    """

    def __init__(
        self, kernel: Any, programs: int, device: torch.device, tiles: dict[str, Tiles] | None = None, **settings: Any
    ) -> None:
        self.kernel, self.programs, self.index = kernel, programs, device.index
        # Sums of products in one rounding, whatever TRITON_DEFAULT_FP_FUSION says: Triton 3.9 warns where neither is
        # given, and later versions are to round twice
        self.settings = {"enable_fp_fusion": True, **settings}
        self.tiles = {k: v for k, v in (tiles or {}).items() if v is not None}
        # else the interpreter, or tests that only compile
        self.direct = isinstance(kernel, JITFunction) and device.type == "cuda"
        if not self.direct:
            return
        self.names = tuple(n for n in kernel.arg_names if n not in settings)
        self.tail = tuple(settings[n] for n in kernel.arg_names[len(self.names) :])
        self.at = tuple((self.names.index(name), tiles) for name, tiles in self.tiles.items())
        # By identity: the hash of a kernel is that of its source
        form = (id(kernel), self.index, tuple(_form(kernel, self.settings)), *[(i, str(t.block)) for i, t in self.at])
        self.compiled: dict[tuple, Any] = _compiled.setdefault(form, {})

    def __call__(self, **tensors: Tensor | None) -> None:
        if not self.direct:
            self._by_triton(tensors)
        elif self.index == driver.active.get_current_device():
            self._run(tensors)
        else:
            with torch.cuda.device(self.index):
                self._run(tensors)

    def _run(self, tensors: dict[str, Tensor | None]) -> None:
        values: list[Any] = list(tensors.values())
        # Addresses, not tensors: else the launcher asks each for its own, and the driver whose it is
        addresses = [None if t is None else t.data_ptr() for t in values]
        kinds: list[Any] = [None if t is None else t.dtype for t in values]
        stream = driver.active.get_current_stream(self.index)
        watched = _watched()
        seen = (self, stream, *addresses, *kinds)
        call = None if watched else _calls.get(seen)
        if call is not None:
            function, arguments, _ = call
            function(*arguments)
            return
        if torch.version.hip is not None:  # there Triton compiles for tensors below 2 GB what others must not run
            kinds += [None if t is None else t.untyped_storage().nbytes() < 2**31 for t in values]
        unaligned = [i for i, address in enumerate(addresses) if address and address % 16]
        compiled = self.compiled.get((*kinds, *unaligned))
        if compiled is None or watched:
            compiled = self._by_triton(tensors)
            self.compiled[(*kinds, *unaligned)] = compiled.result() if hasattr(compiled, "result") else compiled
            return
        for i, tiles in self.at:
            if addresses[i] is not None:
                addresses[i] = tiles.of(values[i])
        # None: metadata and hooks, which are for watchers
        given = (self.programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None)
        function, arguments = _call_of(compiled.run, (*given, *addresses, *self.tail))
        if function is not compiled.run:
            if len(_calls) >= CALLS:
                _calls.clear()
            _calls[seen] = function, arguments, compiled
        function(*arguments)

    def _by_triton(self, tensors: dict[str, Tensor | None]) -> Any:
        if self.direct and tuple(tensors) != self.names:
            raise TypeError(f"{self.kernel.__name__}: expected {', '.join(self.names)}, got {', '.join(tensors)}")
        given: dict[str, Any] = {
            k: self.tiles[k].of(t) if t is not None and k in self.tiles else t for k, t in tensors.items()
        }
        return self.kernel[(self.programs,)](**given, **self.settings)


CALLS = 4096  # 20 MB; a step of 24 blocks makes 800
# What launches pass to the driver (see `_call_of`), and the compiled kernel, whose code leaves the GPU with it
_calls: dict[tuple, tuple[Any, tuple, Any]] = {}

# Compiled kernels by dtypes and alignment of the tensors, for each form of a launch: many lengths share one
_compiled: dict[tuple, dict[tuple, Any]] = {}


def _form(kernel: JITFunction, settings: dict[str, Any]) -> list[tuple]:
    """All of the settings that Triton compiles for."""
    parameters = {p.name: p for p in kernel.params}
    form = []
    for name, value in settings.items():
        given = parameters.get(name)
        if given is None or given.is_constexpr:
            form.append((name, value))
        elif isinstance(value, int):
            if not given.do_not_specialize:
                raise TypeError(f"{kernel.__name__}: list {name} in do_not_specialize")
            form.append((name, -(2**31) <= value < 2**31))
    return form


def _call_of(launcher: Any, arguments: tuple) -> tuple[Any, tuple]:
    """The call of the driver that `launcher(*arguments)` ends in, as (function, arguments).

    Triton's launcher encodes each descriptor anew and walks over all arguments for it, 70 us a launch of both gradients
    on an H100's host; of the same addresses comes the same. So it runs once with a function in the driver's place that
    notes what it is handed: Triton 3.6 to 3.9 on NVIDIA. `launcher, arguments` as they are where it works otherwise, or
    hands over something new each time (memory of its own, the sanitizer's index).
    """
    inner = getattr(launcher, "launch", None)
    anew = [getattr(launcher, f"{kind}_scratch_size", 1) for kind in ("global", "profile")]
    if inner is None or any(anew) or getattr(launcher, "gsan_enabled", False) or torch.version.hip is not None:
        return launcher, arguments
    handed: list[tuple] = []

    def note(*values: Any) -> None:
        handed.append(values)

    function, noting = inner, note
    if isinstance(inner, types.FunctionType):  # makes the descriptors, and calls what it knows as `launcher`
        cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
        if "launcher" not in cells:
            return launcher, arguments
        function = cells["launcher"].cell_contents
        cells["launcher"] = types.CellType(note)
        noting = types.FunctionType(inner.__code__, inner.__globals__, closure=tuple(cells.values()))
    watching = copy.copy(launcher)
    watching.launch = noting
    watching(*arguments)
    return (function, handed[0]) if len(handed) == 1 else (launcher, arguments)


def _watched() -> bool:
    """Whether a profiler wants to see launches."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


@triton.jit
def _probe(x):
    pass


INTERPRETED = not isinstance(_probe, JITFunction)  # TRITON_INTERPRET=1
