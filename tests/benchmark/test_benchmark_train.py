"""The benchmark of training steps runs, and counts what its help says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmark"))
import benchmark_train


@pytest.mark.parametrize("model", ["bimamba+mem_eff", "transformer"])
def test_measures(model):
    row = benchmark_train.measure(model, "patches", benchmark_train.TINY["patches"], "cpu", steps=1, headdim=16)
    assert row["tokens/s"] == pytest.approx(row["samples/s"] * 16) and row["ms"] > 0
    assert row["model"] == model and set(row) <= set(benchmark_train.COLUMNS)
    assert "bimamba" not in model or "tokens/s" in benchmark_train.table([row])


@pytest.mark.parametrize("label", benchmark_train.SHAPES)
def test_models_have_as_many_parameters(label):
    shape = benchmark_train.SHAPES[label]
    ours, other = (
        sum(p.numel() for p in benchmark_train.build(m, shape, 64).parameters()) for m in ("bimamba", "transformer")
    )
    assert other == pytest.approx(ours, rel=0.01)


def test_flops():
    shape = benchmark_train.TINY["dna_1k"]
    net = benchmark_train.build("bimamba", shape, 16)
    d, inner, n, heads = 32, 64, 64, 4
    linear = d * (2 * inner + 2 * n + heads) + inner * d
    tokens = shape.batch * shape.length
    assert benchmark_train.flops(net, shape) == shape.depth * tokens * (6 * linear + 2 * 18 * inner * n)
