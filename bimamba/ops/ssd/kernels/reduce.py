"""Sums of partial gradients in a fixed order: no float atomics, so two runs give the same bits."""

# ruff: noqa: SIM108 - branches on constexpr flags compile one side only; ternaries and `and` would not

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba.ops.launch import Launch, ceil_div


@triton.jit(do_not_specialize=["size", "per_row"])
def reduce_kernel(
    first,
    second,
    out,
    size,
    per_row,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    SECOND: tl.constexpr,
    STEP_SECOND: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o % per_row
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(PARTS):
        o_1 = inside + STEP * WIDTH
        p_part = o + k * size.to(tl.int64)
        acc += tl.load(first + p_part + STEP * WIDTH, mask=(o < size) & (o_1 >= 0) & (o_1 < per_row), other=0.0)
        if SECOND:
            o_2 = inside + STEP_SECOND * WIDTH
            m = (o < size) & (o_2 >= 0) & (o_2 < per_row)
            acc += tl.load(second + p_part + STEP_SECOND * WIDTH, mask=m, other=0.0)
    tl.store(out + o, acc.to(out.dtype.element_ty), mask=o < size)


def reduce_parts(parts: list[Tensor], like: Tensor, steps: list[int] | None = None) -> Tensor:
    """Sum over `parts`, one or two tensors `(count * b, l, g, n)` fp32, in the shape and dtype of `like (b, l, g, n)`.

    With `steps`, row l of the result takes row `l + step` of a tensor, nothing where that lies outside.
    """
    out = torch.empty_like(like)
    _reduce(out.device, out.shape, parts[0].shape[0] // out.shape[0], tuple(steps or [0] * len(parts)))(
        first=parts[0], second=parts[-1], out=out
    )
    return out


@functools.lru_cache(maxsize=4096)
def _reduce(device: torch.device, shape: torch.Size, parts: int, steps: tuple[int, ...]) -> Launch:
    return Launch(
        reduce_kernel,
        ceil_div(shape.numel(), 1024),
        device,
        size=shape.numel(),
        per_row=shape[1:].numel(),
        PARTS=parts,
        STEP=steps[0],
        SECOND=len(steps) == 2,
        STEP_SECOND=steps[-1],
        WIDTH=shape[2] * shape[3],
        BLOCK=1024,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["rows", "rows_D"])
def total_kernel(
    sums,
    parts_D,
    dA,
    dbias,
    dD,
    rows,
    rows_D,
    H: tl.constexpr,
    WIDTH_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (H + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    which = pid // BLOCKS  # 0: dA, 1: dbias, then dD
    o_c = (pid - tl.minimum(which, 2) * BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    width = tl.where(which < 2, H, WIDTH_D)
    stride = tl.where(which < 2, 2 * H, WIDTH_D)
    count = tl.where(which < 2, rows, rows_D)
    if which < 2:
        p_in = sums + which * H
    else:
        p_in = parts_D
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for o_r in range(0, count, ROWS):
        r = o_r + tl.arange(0, ROWS)
        m = (r < count)[:, None] & (o_c < width)[None, :]
        acc += tl.load(p_in + r.to(tl.int64)[:, None] * stride + o_c[None, :], mask=m, other=0.0)
    if which == 0:
        p_out = dA
    elif which == 1:
        p_out = dbias
    else:
        p_out = dD
    tl.store(p_out + o_c, tl.sum(acc, 0), mask=o_c < width)


def totals(sums: Tensor, parts_D: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """dA `(h)`, d(dt_bias) `(h)` and dD of `sums (rows, 2, h)` and `parts_D (rows, h[, p])`: one launch for all
    three."""
    rows, _, h = sums.shape
    dA, dbias = (torch.empty(h, dtype=torch.float32, device=sums.device) for _ in range(2))
    dD = None if parts_D is None else torch.empty(parts_D.shape[1:], dtype=torch.float32, device=sums.device)
    _totals(sums.device, h, rows, *((0, 0) if dD is None else (dD.numel(), parts_D.shape[0])))(
        sums=sums,
        parts_D=sums if dD is None else parts_D,
        dA=dA,
        dbias=dbias,
        dD=dA if dD is None else dD,
    )
    return dA, dbias, dD


@functools.lru_cache(maxsize=4096)
def _totals(device: torch.device, h: int, rows: int, width_D: int, rows_D: int) -> Launch:
    block = 8
    return Launch(
        total_kernel,
        2 * ceil_div(h, block) + ceil_div(width_D, block),
        device,
        rows=rows,
        rows_D=rows_D,
        H=h,
        WIDTH_D=width_D,
        ROWS=256,
        BLOCK=block,
        num_warps=4,
    )
