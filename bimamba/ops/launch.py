"""Launches of Triton kernels that the host hardly feels.

`kernel[grid](...)` looks at every argument anew, builds text from them and finds the compiled kernel under that text:
about 40 us a launch on an H100's host for kernels with 40 arguments. The compiled kernel depends on less: the
constants, and type and alignment of the run-time arguments. Under these it is remembered here.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction


def ceil_div(a: int, b: int) -> int:
    """`triton.cdiv` without its 5 us: that one serves kernels, too."""
    return -(-a // b)


def launch(kernel: Any, programs: int, device: torch.device, **arguments: Any) -> None:
    """`kernel[(programs,)](**arguments)` on `device`, whichever is the current one.

    Integer arguments must be constexpr or listed in `do_not_specialize`: their values are not looked at.
    """
    if not isinstance(kernel, JITFunction) or device.type != "cuda":  # the interpreter; tests that only compile
        kernel[(programs,)](**arguments)
    elif device.index == driver.active.get_current_device():
        _launch(kernel, programs, device, arguments)
    else:
        with torch.cuda.device(device):
            _launch(kernel, programs, device, arguments)


def _launch(kernel: JITFunction, programs: int, device: torch.device, arguments: dict[str, Any]) -> None:
    # By identity: the hash of a kernel is that of its source
    site = _sites.get((id(kernel), *arguments))
    if site is None:
        site = _sites[(id(kernel), *arguments)] = _Site(kernel, tuple(arguments))
    key = (device.index, site.constants(arguments), *[_kind(v) for v in site.run_time(arguments)])
    compiled = site.compiled.get(key)
    if compiled is None or _watched():
        _check_integers(kernel, arguments)
        compiled = kernel[(programs,)](**arguments)
        site.compiled[key] = compiled.result() if hasattr(compiled, "result") else compiled
        return
    stream = driver.active.get_current_stream(device.index)
    compiled.run(
        programs,
        1,
        1,
        stream,
        compiled.function,
        compiled.packed_metadata,
        None,  # metadata and hooks, which are for watchers
        None,
        None,
        *site.in_order(arguments),
    )


class _Site:
    """A kernel with arguments of these names: readers of them, and what was compiled for their kinds."""

    def __init__(self, kernel: JITFunction, given: tuple[str, ...]) -> None:
        constant = {p.name for p in kernel.params if p.is_constexpr}
        names = list(kernel.arg_names)
        missing = [n for n in names if n not in given]
        if missing:
            raise TypeError(f"{kernel.__name__}: arguments missing: {', '.join(missing)}")
        options = [n for n in given if n not in names]
        self.constants = itemgetter(*[n for n in names if n in constant], *options)
        self.run_time = itemgetter(*[n for n in names if n not in constant])
        self.in_order = itemgetter(*names)
        self.compiled: dict[tuple, Any] = {}


_sites: dict[tuple, _Site] = {}


def _check_integers(kernel: JITFunction, arguments: dict[str, Any]) -> None:
    loose = [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)]
    loose = [name for name in loose if isinstance(arguments[name], int)]
    if loose:
        raise TypeError(f"{kernel.__name__}: list {', '.join(loose)} in do_not_specialize")


def _kind(value: Any) -> Any:
    """All of a run-time argument that Triton compiles for."""
    given = type(value)
    if given is Tensor or given is torch.nn.Parameter:
        return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype, "unaligned")
    if value is None or given is float:
        return given
    if given is int:
        return -(2**31) <= value < 2**31
    return value.base.dtype, *value.block_shape, len(value.shape)  # a tensor descriptor


def _watched() -> bool:
    """Whether a profiler wants to see launches."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


@triton.jit
def _probe(x):
    pass


INTERPRETED = not isinstance(_probe, JITFunction)  # TRITON_INTERPRET=1
