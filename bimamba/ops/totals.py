"""Sums of a backward pass's partial gradients in a fixed order, all in one launch, written as the parameters lie: no
float atomics, so two runs give the same bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, ceil_div, once_a_form

SLOTS = 4  # sums that a launch takes
ROWS, BLOCK = 256, 8


class Total(NamedTuple):
    """`sums.sum(0)`: its first columns in `out`, those behind them in `rest` or nowhere."""

    sums: Tensor  # (rows, ...) fp32, contiguous
    out: Tensor
    rest: Tensor | None = None
    factor: Tensor | None = None  # of `out`, elementwise
    taps: int = 1  # columns (taps, d) become (d, taps) in `out`


@triton.jit
def _total(
    pid,
    sums,
    out,
    rest,
    factor,
    rows,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Column block `pid` of a slot, whose `out` is WIDTH wide."""
    if sums is not None:
        o_c = pid * BLOCK + tl.arange(0, BLOCK)
        m_c = o_c < COLUMNS
        acc = tl.zeros((ROWS, BLOCK), tl.float32)
        for o_r in range(0, rows, ROWS):
            r = o_r + tl.arange(0, ROWS)
            m = (r < rows)[:, None] & m_c[None, :]
            acc += tl.load(sums + r.to(tl.int64)[:, None] * COLUMNS + o_c[None, :], mask=m, other=0.0)
        total = tl.sum(acc, 0)
        if rest is not None:
            tl.store(rest + (o_c - WIDTH), total.to(rest.dtype.element_ty), mask=(o_c >= WIDTH) & m_c)
        if factor is not None:
            total *= tl.load(factor + o_c, mask=o_c < WIDTH, other=0.0)
        o_out = o_c % (WIDTH // TAPS) * TAPS + o_c // (WIDTH // TAPS)
        tl.store(out + o_out, total.to(out.dtype.element_ty), mask=o_c < WIDTH)


@triton.jit(do_not_specialize=["rows_0", "rows_1", "rows_2", "rows_3"])
def total_kernel(
    sums_0,
    out_0,
    rest_0,
    factor_0,
    sums_1,
    out_1,
    rest_1,
    factor_1,
    sums_2,
    out_2,
    rest_2,
    factor_2,
    sums_3,
    out_3,
    rest_3,
    factor_3,
    rows_0,
    rows_1,
    rows_2,
    rows_3,
    COLUMNS_0: tl.constexpr,
    COLUMNS_1: tl.constexpr,
    COLUMNS_2: tl.constexpr,
    COLUMNS_3: tl.constexpr,
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    WIDTH_3: tl.constexpr,
    TAPS_0: tl.constexpr,
    TAPS_1: tl.constexpr,
    TAPS_2: tl.constexpr,
    TAPS_3: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    FIRST_1: tl.constexpr = (COLUMNS_0 + BLOCK - 1) // BLOCK
    FIRST_2: tl.constexpr = FIRST_1 + (COLUMNS_1 + BLOCK - 1) // BLOCK
    FIRST_3: tl.constexpr = FIRST_2 + (COLUMNS_2 + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    if pid < FIRST_1:
        _total(pid, sums_0, out_0, rest_0, factor_0, rows_0, COLUMNS_0, WIDTH_0, TAPS_0, ROWS, BLOCK)
    elif pid < FIRST_2:
        _total(pid - FIRST_1, sums_1, out_1, rest_1, factor_1, rows_1, COLUMNS_1, WIDTH_1, TAPS_1, ROWS, BLOCK)
    elif pid < FIRST_3:
        _total(pid - FIRST_2, sums_2, out_2, rest_2, factor_2, rows_2, COLUMNS_2, WIDTH_2, TAPS_2, ROWS, BLOCK)
    else:
        _total(pid - FIRST_3, sums_3, out_3, rest_3, factor_3, rows_3, COLUMNS_3, WIDTH_3, TAPS_3, ROWS, BLOCK)


def totals(*parts: Total) -> None:
    """Writes all of `parts`, at most `SLOTS`."""
    tensors: dict[str, Tensor | None] = {}
    for i in range(SLOTS):
        sums, out, rest, factor, _ = parts[i] if i < len(parts) else (None,) * 5
        tensors |= {f"sums_{i}": sums, f"out_{i}": out, f"rest_{i}": rest, f"factor_{i}": factor}
    _launch(parts[0].sums.device, *[(t.sums.shape, t.out.numel(), t.taps) for t in parts])(**tensors)


@once_a_form
def _launch(device: torch.device, *forms: tuple[torch.Size, int, int]) -> Launch:
    """forms: shape of the sums, elements of `out`, taps."""
    settings: dict[str, Any] = {}
    blocks = 0
    for i in range(SLOTS):
        shape, width, taps = forms[i] if i < len(forms) else (torch.Size((0, 0)), 1, 1)
        columns = shape[1:].numel()
        blocks += ceil_div(columns, BLOCK)
        settings |= {f"rows_{i}": shape[0], f"COLUMNS_{i}": columns, f"WIDTH_{i}": width, f"TAPS_{i}": taps}
    return Launch(total_kernel, blocks, device, **settings, ROWS=ROWS, BLOCK=BLOCK, num_warps=4)
