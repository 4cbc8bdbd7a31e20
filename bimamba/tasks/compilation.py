"""`torch.compile` of a whole network, or one clear reason why not."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable

import torch
from torch import nn

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # which record CUDA graphs
# Training, evaluation, and on CPUs a few classes of lengths (shorter than a chunk, a multiple of it, any other), each
# once with fixed and once with free sizes: more than the 8 graphs that torch allows, and far fewer than shapes.
GRAPHS = 64


def compile_network(
    net: nn.Module, mode: str | None = None, dynamic: bool | None = None, backend: str | Callable = "inductor"
) -> None:
    """Compiles the network in place, as one graph: a graph break is an error, names of parameters stay.

    Args:
        net: the network.
        mode: see `torch.compile`; "reduce-overhead" records CUDA graphs, for small networks and static shapes.
        dynamic: True: one graph for every batch size and length; False: one a shape; None: fixed sizes at first, and
            free ones from the second shape on.
        backend: of `torch.compile`.

    Raises:
        ValueError: an unknown mode, or no compiler on this machine.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"task.compile_options.mode: expected null or one of {', '.join(MODES)}, got {mode!r}")
    if mode is not None and backend != "inductor":
        raise ValueError(f"task.compile_options.mode: expected null with backend={backend!r}, got {mode!r}")
    if backend == "inductor":
        _expect_compiler()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    # One graph under DistributedDataParallel too, not one a bucket of gradients: CUDA graphs stay whole, and buckets
    # are summed while the optimizer's turn is prepared, which for networks of some million weights costs nothing.
    torch._dynamo.config.optimize_ddp = False
    net.compile(fullgraph=True, mode=mode, dynamic=dynamic, backend=backend)


def _expect_compiler() -> None:
    """On CPUs the code is C++; on GPUs Triton needs a C compiler for its launchers."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["cl"] if sys.platform == "win32" else ["g++", "clang++"]
    if torch.cuda.is_available():
        names += [name for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name]
    if not any(map(shutil.which, names)):
        raise ValueError(
            f"task.compile=true: expected a C++ compiler ({' or '.join(names)}), found none on this machine; install "
            "one (apt install g++), name it in the variable CXX, or set task.compile=false"
        )
