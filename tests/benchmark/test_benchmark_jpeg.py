"""The reference network is that of the paper, and its recipe learns."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmark"))
import benchmark_jpeg


def test_the_network_is_of_the_published_size():
    """He et al. 2016, table 6: 20 layers 0.27M, 56 layers 0.85M."""
    for units, millions in ((3, 0.27), (9, 0.85)):
        net = benchmark_jpeg.resnet(units)
        assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions
        assert sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in net.modules()) == 6 * units + 2


def test_it_learns():
    torch.manual_seed(0)
    label = torch.arange(1000) % 10
    images = torch.randn(10, 3, 1, 1)[label] + 0.3 * torch.randn(1000, 3, 8, 8)
    splits = (images[:800], label[:800]), (images[800:], label[800:])
    assert benchmark_jpeg.accuracy(benchmark_jpeg.train(splits[0], 40, "cpu"), splits[1]) > 50
