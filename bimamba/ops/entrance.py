"""How a call enters an operator: through PyTorch's dispatcher where somebody watches, else past it.

The dispatcher passes every argument through C++ and back at each of its keys: 0.2 ms of a scan's forward and backward
pass, as much as all of its launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
