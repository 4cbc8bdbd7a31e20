"""How a call enters an operator: through PyTorch's dispatcher where somebody watches, else past it.

The dispatcher passes every argument through C++ and back at each of its keys: 0.2 ms of a scan's forward and backward
pass, as much as all of its launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, list, tuple, torch.dtype})


def watched(arguments: Iterable[Any]) -> bool:
    """Whether a mode, a subclass, a tracer or a transform of torch.func sees calls with these arguments."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or bool(torch._C._len_torch_dispatch_stack())
        or bool(torch._C._len_torch_function_stack())
        or not PLAIN.issuperset(map(type, arguments))
    )


def enter(operator: Any, function: type[torch.autograd.Function], direct: Callable[..., Any], *args: Any) -> Any:
    """Call an operator with its autograd.

    Args:
        operator: the `torch.ops` overload. function: its autograd, whose forward pass calls `operator` or, where nobody
            watches, `direct`. direct: what the operator runs.
    """
    if watched(args):
        # torch.func's transforms see an autograd.Function, but not through an operator's autograd key
        transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        return function.apply(*args) if transformed else operator(*args)
    if torch.is_grad_enabled() and any([a.requires_grad for a in args if isinstance(a, Tensor)]):
        # `Function.apply` reads the signature of `forward` anew at every call, to fill in defaults that we have not
        return super(torch.autograd.Function, function).apply(*args)
    return direct(*args)


def below_autograd(operator: Any, direct: Callable[..., Any], *args: Any) -> Any:
    """The forward or backward pass of an operator's autograd function."""
    if watched(args):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)
    return direct(*args)


def once(grads: Sequence[Tensor | None], tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a backward pass; where `create_graph` asks for a graph of it, such that to go through it raises.

    Kernels have no second derivatives, and without a word autograd would take theirs for zero.

    Args:
        grads: of the forward pass's arguments. tensors: all that they depend on.
    """
    # torch.func always asks for a graph; that of a second derivative does not come here (`backend._transformed`)
    again = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    if not again or not any([t is not None and t.requires_grad for t in tensors]):
        return tuple(grads)
    there = [t.detach().requires_grad_() for t in grads if t is not None]
    refusing = iter(torch._C._functions.DelayedError(_NO_SECOND, len(there))(*there))
    return tuple(None if t is None else next(refusing) for t in grads)


_NO_SECOND = (
    b"the Triton kernels have no second derivatives (create_graph=True: gradient penalties, Hessians); the PyTorch "
    b"path has: backend='torch', or BIMAMBA_BACKEND=torch in the environment"
)


def implement(
    library: torch.library.Library, name: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Make `function` what operator `name` of `library` runs on CPUs and GPUs, and `fake` its shapes and dtypes."""
    for device in ("CPU", "CUDA"):
        library.impl(name, function, device)
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)


def differentiable(library: torch.library.Library, operator: Any, function: type[torch.autograd.Function]) -> None:
    """Make `function` the autograd of `operator`, one of `library`.

    By hand: `torch.library.register_autograd` walks the schema anew at every call, 0.3 ms for a scan's arguments.
    """

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            out = function.apply(*args)
            return list(out) if returns_list else out
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    returns_list = str(operator._schema.returns[0].type) == "List[Tensor]"
    library.impl(operator._schema.name.split("::")[1], call, "Autograd")
