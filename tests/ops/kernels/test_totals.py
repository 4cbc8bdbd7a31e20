"""Sums of partial gradients, and what the kernels read instead of parameters."""

from __future__ import annotations

import pytest
import torch
from problems import relative_error

pytest.importorskip("triton")

from bimamba.ops.prepare import prepare
from bimamba.ops.totals import Total, totals

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("rows", [1, 300])
def test_totals(rows):
    torch.manual_seed(0)
    heads, conv, norm = (torch.randn(rows, *size, device=DEVICE) for size in ((2, 5), (4, 21), (40,)))
    new = {"dA": 5, "dbias": 5, "dweight": (21, 1, 3), "dconv_bias": 21, "dnorm": 40}
    out = {
        name: torch.full(size if isinstance(size, tuple) else (size,), torch.nan, device=DEVICE)
        for name, size in new.items()
    }
    out["dnorm"] = out["dnorm"].half()
    factor = torch.randn(5, device=DEVICE)
    totals(
        Total(heads, out["dA"], out["dbias"], factor=factor),
        Total(conv, out["dweight"], out["dconv_bias"], taps=3),
        Total(norm, out["dnorm"]),
    )
    expected = {
        "dA": heads[:, 0].double().sum(0) * factor,
        "dbias": heads[:, 1].double().sum(0),
        "dweight": conv[:, :3].double().sum(0).t()[:, None],
        "dconv_bias": conv[:, 3].double().sum(0),
        "dnorm": norm.double().sum(0),
    }
    for name, value in expected.items():
        assert relative_error(out[name], value) < (5e-4 if name == "dnorm" else 1e-6), name  # fp16 rounds at 2^-11


def test_columns_behind_without_a_place_are_dropped():
    """The convolution's kernel leaves the bias' row unwritten where there is none."""
    sums = torch.tensor([[[1.0, 2.0], [torch.nan, torch.nan]]], device=DEVICE)
    out = torch.zeros(2, 1, 1, device=DEVICE)
    totals(Total(sums, out))
    assert out.flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepare(dtype):
    torch.manual_seed(0)
    A_log, weight = torch.randn(6, device=DEVICE).to(dtype), torch.randn(300, 1, 7, device=DEVICE).to(dtype)
    A, taps = prepare(A_log, weight)
    assert A.dtype == torch.float32 and torch.equal(A, -A_log.double().exp().float())
    assert torch.equal(taps, weight[:, 0].t())
