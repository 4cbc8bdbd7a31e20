"""Which implementation serves a call: the rule that all operators share."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

_said: set[str] = set()


def expect_device(name: str, x: Tensor, /, **others: Tensor | None) -> None:
    """Kernels are handed addresses: one of another device would be read all the same.

    Args:
        name: of x.

    Raises:
        ValueError: one of `others` lies on another device than x.
    """
    for other, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{other}: expected the device of {name}, {x.device}, got {t.device}")


def expect_bool(mask: Tensor | None) -> None:
    """Raises a ValueError for a mask of numbers, such as the int64 of Hugging Face's tokenizers: attention would add
    them to its scores, and elsewhere `~mask` is something else."""
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask: expected dtype bool, got {mask.dtype}")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`; torch refuses the question for some, such as meta."""
    kind = x.device.type
    # Dynamo (2.11) cannot trace whether there is one; what is compiled runs on a device that has
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return available and torch.is_autocast_enabled(kind)


def choose_backend(x: Tensor, backend: str, backends: tuple[str, ...], refusal: Callable[[], str | None]) -> str:
    """One of `backends`, which hold "auto", "triton" and "torch".

    "auto" (which the environment variable `BIMAMBA_BACKEND` replaces) falls back to torch only where Triton or a GPU is
    missing, or where the kernels cannot serve the call, as `refusal` says; on a GPU it warns, once. A kernel that fails
    to compile raises.

    Raises:
        ValueError: an unknown backend, or Triton demanded where it cannot serve.
    """
    source = "backend"
    if backend == "auto" and os.environ.get("BIMAMBA_BACKEND"):
        backend, source = os.environ["BIMAMBA_BACKEND"], "BIMAMBA_BACKEND"
        if backend == "reference" and backend not in backends:  # an operator whose reference is its PyTorch path
            return "torch"
    if backend not in backends:
        raise ValueError(f"{source}: expected one of {backends}, got {backend!r}")
    if backend not in ("auto", "triton") or (backend == "auto" and x.device.type == "cpu"):
        return "torch" if backend == "auto" else backend
    why = refusal() or triton_unavailable(x) or _transformed()
    if why is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"{source}='triton' was demanded, but {why}; use backend='torch' or 'auto'")
    _warn_once(f"bimamba runs its PyTorch path on {x.device.type}: {why}")
    return "torch"


def triton_unavailable(x: Tensor) -> str | None:
    """Why Triton cannot serve the device of `x`; None if it can. Triton's interpreter serves the CPU."""
    try:
        from .launch import INTERPRETED
    except ImportError as error:
        return f"Triton 3.6 or newer cannot be imported ({error})"
    if INTERPRETED and not x.is_meta:
        return None
    if x.device.type != "cuda":
        return f"Triton kernels run on CUDA and ROCm devices (or with TRITON_INTERPRET=1 on the CPU), not on {x.device}"
    # Dynamo warns of caches
    return (_too_old.__wrapped__ if torch.compiler.is_compiling() else _too_old)(x.device)


def _transformed() -> str | None:
    """Why kernels cannot serve under the transforms that are active; None if they can: one `torch.func.grad`."""
    if torch.compiler.is_compiling():
        return None
    kinds = []
    if torch._C._are_functorch_transforms_active():
        kinds = [interpreter.key().name for interpreter in retrieve_all_functorch_interpreters()]
    forward = forward_ad._current_level >= 0
    if forward or "Vmap" in kinds or "Jvp" in kinds or kinds.count("Grad") > 1:
        what = "torch.func's " + ", ".join(kinds).lower() if kinds else "forward-mode derivatives"
        return f"the kernels have first derivatives in reverse mode alone, and no vmap: {what} asked for more"
    return None


@functools.lru_cache  # 3 us a call otherwise
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"the kernels need compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    return None


@torch.compiler.assume_constant_result  # a compiler calls it while it traces, instead of breaking the graph
def _warn_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=4)
