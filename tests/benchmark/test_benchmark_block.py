"""The benchmark of a block's stages runs, and counts bytes as BENCHMARKS.md does by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmark"))
import benchmark_block

from bimamba.nn import BiMamba2


def test_stages_are_measured():
    block, u = BiMamba2(16, d_state=8, headdim=8), torch.randn(1, 20, 16, requires_grad=True)
    for name, (call, leaves) in benchmark_block.stages(block, u).items():
        outputs = call()
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
        assert all(g.abs().sum() > 0 for g in grads), name
    row = benchmark_block.measured(call, leaves, "cpu")
    assert row["forward+backward, ms"] > row["forward, ms"] > 0


def test_bytes():
    """b8 l2048 h24 p64 n64, bf16: the stages' table of BENCHMARKS.md, whose megabytes hold the small vectors, too."""
    with torch.device("meta"):
        block, u = BiMamba2(768, headdim=64), torch.empty(8, 2048, 768, dtype=torch.bfloat16)
    counted = benchmark_block.bytes_moved(block, u.to("meta"))
    by_hand = dict(
        states_kernel=154 + 204, output_kernel=206, gradients_kernel=374, grad_bc_kernel=311, grad_x_kernel=263
    )
    assert {k: counted[k] / 1e6 for k in by_hand} == pytest.approx(by_hand, rel=0.04)
