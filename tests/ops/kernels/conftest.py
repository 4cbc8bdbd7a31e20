"""Scans through the Triton operators, for the tests of this folder: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")


def scan(**arguments):
    """`ssd_reference`'s arguments and results (states included), by the Triton operators."""
    from bimamba.ops.ssd import binding

    forward, backward = arguments.pop("forward"), arguments.pop("backward")
    own = {}
    if backward is not None and backward is not forward:
        own = {f"{k}_back": v for k, v in backward._asdict().items()}
    x = arguments.pop("x")
    options = dict(dt_bias=forward.dt_bias, bidirectional=backward is not None, return_final_states=True, **own)
    return binding.chunk_scan(x, *forward[:4], **options, **arguments)


@pytest.fixture
def run():
    return scan


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel forgets to write reads as NaN."""

    def poison(make):
        def new(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return new

    from bimamba.ops import mixer, prepare
    from bimamba.ops.conv1d import kernels as conv
    from bimamba.ops.gated_norm import kernels as norm
    from bimamba.ops.ssd import binding
    from bimamba.ops.ssd.kernels import gate, grad_bc, grad_x, output, reduce, scan, states

    class Poisoned:
        empty, empty_like = staticmethod(poison(torch.empty)), staticmethod(poison(torch.empty_like))

        def __getattr__(self, name):
            return getattr(torch, name)

    for module in (gate, grad_bc, grad_x, output, reduce, scan, states, binding, mixer, prepare, conv, norm):
        monkeypatch.setattr(module, "torch", Poisoned())
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
