"""Triton kernels of the convolution: rows of channels, each tap a load that the caches serve.

A program owns (batch row, rows, channels). The forward pass writes up to five tensors of their own, so that the scan
finds x, B and C contiguous. The gradient walks down the rows, a warp a walk, and reads and writes everything once.
"""

# ruff: noqa: RUF005 - Triton joins tuples by +, it does not unpack them

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, ceil_div, once_a_form, row_stride

BLOCK_L, BLOCK_D = 64, 64
# Walks of the gradient: how many a program takes, a warp each; how many rows at least, for all of them read
# 2 (width - 1) rows more than they own; how many programs are enough; and how many rows are loaded ahead
GRAD_SIDE, GRAD_ROWS, GRAD_PROGRAMS, GRAD_UNROLL = 4, 64, 2048, 8


@triton.jit
def _tap(x, r, k, o_c, m_c, ids, p_mask, p_seq, L, STRIDE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SEQ: tl.constexpr):
    """Rows `r + k` of x in fp32, zero where they are no neighbours of rows `r`."""
    o_r = r + k
    m = (o_r >= 0) & (o_r < L)
    if HAS_MASK:
        m = m & (tl.load(p_mask + o_r, mask=m, other=0) != 0)
    if HAS_SEQ:
        m = m & (tl.load(p_seq + o_r, mask=m, other=-1) == ids)
    return tl.load(x + o_r.to(tl.int64)[:, None] * STRIDE + o_c[None, :], mask=m[:, None] & m_c[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def _taps(
    acc,
    x,
    weight,
    r,
    o_c,
    m_c,
    ids,
    p_mask,
    p_seq,
    L,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SEQ: tl.constexpr,
):
    """`acc` and what all taps see of rows `r`."""
    for k in tl.static_range(WIDTH):
        w = tl.load(weight + k * D + o_c, mask=m_c, other=0.0).to(tl.float32)
        acc += _tap(x, r, k - LEFT, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, HAS_MASK, HAS_SEQ) * w[None, :]
    return acc


@triton.jit
def _part(
    i_d,
    t_0,
    t_1,
    t_2,
    t_3,
    t_4,
    D_0: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    D_3: tl.constexpr,
    D_4: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The part that channel block `i_d` belongs to: its tensor, first channel and width, and the block's number in
    it."""
    N_0: tl.constexpr = (D_0 + COLUMNS - 1) // COLUMNS
    N_1: tl.constexpr = N_0 + (D_1 + COLUMNS - 1) // COLUMNS
    N_2: tl.constexpr = N_1 + (D_2 + COLUMNS - 1) // COLUMNS
    N_3: tl.constexpr = N_2 + (D_3 + COLUMNS - 1) // COLUMNS
    if i_d < N_0:
        t, first, width = t_0, 0, D_0
    elif i_d < N_1:
        t, first, width = t_1, D_0, D_1
        i_d -= N_0
    elif i_d < N_2:
        t, first, width = t_2, D_0 + D_1, D_2
        i_d -= N_1
    elif i_d < N_3:
        t, first, width = t_3, D_0 + D_1 + D_2, D_3
        i_d -= N_2
    else:
        t, first, width = t_4, D_0 + D_1 + D_2 + D_3, D_4
        i_d -= N_3
    return t, first, width, i_d


@triton.jit
def _blocks(
    D_0: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    D_3: tl.constexpr,
    D_4: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Blocks of channels, none across two parts."""
    upper: tl.constexpr = tl.cdiv(D_0, COLUMNS) + tl.cdiv(D_1, COLUMNS) + tl.cdiv(D_2, COLUMNS)
    return upper + tl.cdiv(D_3, COLUMNS) + tl.cdiv(D_4, COLUMNS)


@triton.jit(do_not_specialize=["L"])
def conv_kernel(
    x,
    weight,
    bias,
    mask,
    seq,
    out_0,
    out_1,
    out_2,
    out_3,
    out_4,
    L,
    STRIDE: tl.constexpr,
    D_0: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    D_3: tl.constexpr,
    D_4: tl.constexpr,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    ACTIVATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y, in parts of D_0 .. D_4 channels, each cut into blocks of COLUMNS."""
    BLOCKS = _blocks(D_0, D_1, D_2, D_3, D_4, COLUMNS)
    D: tl.constexpr = D_0 + D_1 + D_2 + D_3 + D_4
    pid = tl.program_id(0)
    i_d = pid % BLOCKS
    pid //= BLOCKS
    row_blocks = tl.cdiv(L, ROWS)
    o_l = (pid % row_blocks) * ROWS
    i_b = (pid // row_blocks).to(tl.int64)
    out, first, width, i_d = _part(i_d, out_0, out_1, out_2, out_3, out_4, D_0, D_1, D_2, D_3, D_4, COLUMNS)
    r = o_l + tl.arange(0, ROWS)
    o_out = i_d * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_out < width
    o_c = first + o_out
    p_x = x + i_b * L * STRIDE
    p_mask = mask + i_b * L if HAS_MASK else mask
    p_seq = seq + i_b * L if HAS_SEQ else seq
    ids = tl.load(p_seq + r, mask=r < L, other=-1) if HAS_SEQ else r
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if HAS_SEQ:
        # Most blocks read rows of one sequence alone, and need not compare
        o_read = tl.arange(0, 2 * ROWS)
        m_read = (o_l + o_read >= LEFT) & (o_l + o_read < LEFT + L) & (o_read < ROWS + WIDTH - 1)
        differ = m_read & (tl.load(p_seq + o_l - LEFT + o_read, mask=m_read, other=0) != tl.load(p_seq + o_l))
        several = tl.max(differ.to(tl.int32), 0) != 0
    else:
        several: tl.constexpr = False
    if several:
        acc = _taps(acc, p_x, weight, r, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, D, WIDTH, LEFT, HAS_MASK, True)
    else:
        acc = _taps(acc, p_x, weight, r, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, D, WIDTH, LEFT, HAS_MASK, False)
    if ACTIVATE:
        acc = acc / (1.0 + tl.exp(-acc))
    o = (i_b * L + r)[:, None] * width + o_out[None, :]
    tl.store(out + o, acc.to(out.dtype.element_ty), mask=(r < L)[:, None] & m_c[None, :])


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return out


@triton.jit
def _grad_loads(
    i,
    last,
    p_x,
    p_dy,
    p_mask,
    m_c,
    width,
    STRIDE: tl.constexpr,
    LATER: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows `i ..` of x, and those of dy, which are LATER rows before them."""
    x = ()
    dy = ()
    for u in tl.static_range(ROWS):
        m = (i + u >= 0) & (i + u < last)
        if HAS_MASK:
            m = m & (tl.load(p_mask + i + u, mask=m, other=0) != 0)
        x = x + (tl.load(p_x + (i + u).to(tl.int64)[:, None] * STRIDE, mask=m[:, None] & m_c[None, :], other=0.0),)
        r = i + u - LATER
        m = (r >= 0) & (r < last)
        dy = dy + (tl.load(p_dy + r.to(tl.int64)[:, None] * width, mask=m[:, None] & m_c[None, :], other=0.0),)
    return x, dy


@triton.jit
def _id(p_seq, i, last):
    """Of row i of each walk; -1 beyond the ends, where x and dy are zero whatever is compared."""
    return tl.load(p_seq + i, mask=(i >= 0) & (i < last), other=-1)


@triton.jit
def _grad_rows(
    i,
    start,
    end,
    last,
    next_x,
    next_dy,
    xs,
    dvs,
    dw,
    db,
    w,
    b_bias,
    p_dx,
    p_mask,
    p_seq,
    m_c,
    STRIDE_DX: tl.constexpr,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    ACTIVATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    SIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A step of the gradient's walks: rows `i ..` of x and those of dy that they complete. Returns the last rows of x
    and dv, and the sums over the rows so far."""
    BEHIND: tl.constexpr = WIDTH - 1
    for u in tl.static_range(UNROLL):
        r = i + u - (BEHIND - LEFT)
        j = r - LEFT
        xs = xs + (next_x[u].to(tl.float32),)
        taps = xs
        if HAS_SEQ:
            taps = ()
            id_r = _id(p_seq, r, last)
            id_j = _id(p_seq, j, last)
            for k in tl.static_range(WIDTH):
                taps = taps + (tl.where((_id(p_seq, r - LEFT + k, last) == id_r)[:, None], xs[k], 0.0),)
        dv = next_dy[u].to(tl.float32)
        if ACTIVATE:
            v = tl.zeros((SIDE, COLUMNS), tl.float32) + b_bias[None, :]
            for k in tl.static_range(WIDTH):
                v += taps[k] * w[k]
            sigmoid = 1.0 / (1.0 + tl.exp(-v))
            dv *= sigmoid * (1.0 + v * (1.0 - sigmoid))
        own = tl.where(((r >= start) & (r < end))[:, None], dv, 0.0)
        sums_now = ()
        for k in tl.static_range(WIDTH):
            sums_now = sums_now + (dw[k] + own * taps[k],)
        dw = sums_now
        db += own
        dvs = dvs + (dv,)
        acc = tl.zeros((SIDE, COLUMNS), tl.float32)
        for k in tl.static_range(WIDTH):
            part = dvs[BEHIND - k] * w[k]
            if HAS_SEQ:
                part = tl.where((_id(p_seq, r - k, last) == id_j)[:, None], part, 0.0)
            acc += part
        m = (j >= start) & (j < end)
        if HAS_MASK:
            acc = tl.where((tl.load(p_mask + j, mask=m, other=0) != 0)[:, None], acc, 0.0)
        o = j.to(tl.int64)[:, None] * STRIDE_DX
        tl.store(p_dx + o, acc.to(p_dx.dtype.element_ty), mask=m[:, None] & m_c[None, :])
        xs = xs[1:]
        dvs = dvs[1:]
    return xs, dvs, dw, db


@triton.jit(do_not_specialize=["L", "WALKS", "CHUNKS", "LENGTH"])
def conv_grad_kernel(
    x,
    weight,
    bias,
    mask,
    seq,
    dy_0,
    dy_1,
    dy_2,
    dy_3,
    dy_4,
    dx,
    sums,
    L,
    WALKS,
    CHUNKS,
    LENGTH,
    STRIDE: tl.constexpr,
    STRIDE_DX: tl.constexpr,
    D_0: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    D_3: tl.constexpr,
    D_4: tl.constexpr,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    ACTIVATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    SIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """SIDE walks, each down LENGTH rows of COLUMNS channels, with the last rows of x and dv at hand: row i of x
    completes dv, the gradient before the activation, of row r = i - (WIDTH - 1 - LEFT), and that dx_j =
    sum_k weight[:, k] dv[j - k + LEFT] of row j = r - LEFT. So a walk reads WIDTH - 1 rows before its own and as many
    behind them."""
    BLOCKS = _blocks(D_0, D_1, D_2, D_3, D_4, COLUMNS)
    D: tl.constexpr = D_0 + D_1 + D_2 + D_3 + D_4
    BEHIND: tl.constexpr = WIDTH - 1
    pid = tl.program_id(0)
    i_d = pid % BLOCKS
    pid //= BLOCKS
    i_w = pid * SIDE + tl.arange(0, SIDE)
    dy, first, width, i_d = _part(i_d, dy_0, dy_1, dy_2, dy_3, dy_4, D_0, D_1, D_2, D_3, D_4, COLUMNS)
    o_d = i_d * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_d < width
    o_c = first + o_d
    i_b = (i_w // CHUNKS).to(tl.int64)
    start = (i_w % CHUNKS) * LENGTH
    end = tl.where(i_w < WALKS, tl.minimum(start + LENGTH, L), start)
    last = tl.where(i_w < WALKS, L, 0)  # walks that are not there read and write no row
    p_x = x + (i_b * L * STRIDE)[:, None] + o_c[None, :]
    p_dy = dy + (i_b * L * width)[:, None] + o_d[None, :]
    p_dx = dx + (i_b * L * STRIDE_DX)[:, None] + o_c[None, :]
    p_mask = mask + i_b * L if HAS_MASK else mask
    p_seq = seq + i_b * L if HAS_SEQ else seq
    b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros((COLUMNS,), tl.float32)
    w = ()
    for k in tl.static_range(WIDTH):
        w = w + (tl.load(weight + k * D + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :],)
    xs = _zeros(BEHIND, SIDE, COLUMNS)
    dvs = _zeros(BEHIND, SIDE, COLUMNS)
    dw = _zeros(WIDTH, SIDE, COLUMNS)
    db = tl.zeros((SIDE, COLUMNS), tl.float32)
    READ: tl.constexpr = 2 * BEHIND - LEFT  # rows before those of a step whose ids matter to it
    o_id = tl.arange(0, triton.next_power_of_2(READ + UNROLL))[None, :]
    for step in range(tl.cdiv(LENGTH + 2 * BEHIND, UNROLL)):
        i = start - BEHIND + step * UNROLL
        # All loads of a step before its stores, which the compiler does not reorder
        next_x, next_dy = _grad_loads(
            i, last, p_x, p_dy, p_mask, m_c, width, STRIDE, BEHIND - LEFT, HAS_MASK, UNROLL
        )  # fmt: skip
        if HAS_SEQ:
            row = i[:, None] - READ + o_id
            m_id = (row >= 0) & (row < last[:, None]) & (o_id < READ + UNROLL)
            ids = tl.load(p_seq[:, None] + row, mask=m_id, other=-1)
            differ = (ids != _id(p_seq, i, last)[:, None]) & (o_id < READ + UNROLL)
            several = tl.max(tl.max(differ.to(tl.int32), 1), 0) != 0
        else:
            several: tl.constexpr = False
        if several:
            # Few steps are of several sequences. Row by row, so that they need no more registers than the others: more
            # would be a program less on a multiprocessor
            for _ in range(UNROLL):
                now_x, now_dy = _grad_loads(
                    i, last, p_x, p_dy, p_mask, m_c, width, STRIDE, BEHIND - LEFT, HAS_MASK, 1
                )  # fmt: skip
                xs, dvs, dw, db = _grad_rows(
                    i, start, end, last, now_x, now_dy, xs, dvs, dw, db, w, b_bias, p_dx, p_mask, p_seq, m_c,
                    STRIDE_DX, WIDTH, LEFT, ACTIVATE, HAS_MASK, True, SIDE, COLUMNS, 1,
                )  # fmt: skip
                i += 1
        else:
            xs, dvs, dw, db = _grad_rows(
                i, start, end, last, next_x, next_dy, xs, dvs, dw, db, w, b_bias, p_dx, p_mask, p_seq, m_c,
                STRIDE_DX, WIDTH, LEFT, ACTIVATE, HAS_MASK, False, SIDE, COLUMNS, UNROLL,
            )  # fmt: skip
    p_sums = sums + pid.to(tl.int64) * (WIDTH + 1) * D + o_c
    for k in tl.static_range(WIDTH):
        tl.store(p_sums + k * D, tl.sum(dw[k], 0), mask=m_c)
    if HAS_BIAS:
        tl.store(p_sums + WIDTH * D, tl.sum(db, 0), mask=m_c)


def _parts(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}_{i}": tensors[min(i, len(tensors) - 1)] for i in range(5)}


def _count(split: tuple[int, ...]) -> int:
    return sum(ceil_div(size, BLOCK_D) for size in split)


def by_taps(weight: Tensor) -> Tensor:
    """`(width, d)` of `(d, width)`: with the taps innermost every weight would be a load of its own, and those the
    kernels' bound."""
    return weight.t().contiguous()


class Form(NamedTuple):
    """A convolution's sizes and flags: all that its launches depend on beside batch and length."""

    split: tuple[int, ...]  # channels of the output's parts
    width: int
    left: int  # taps before a row's own
    activate: bool
    bias: bool
    mask: bool
    seq: bool


def form_of(
    weight: Tensor,
    bias: Tensor | None,
    activate: bool,
    left: int,
    mask: Tensor | None,
    seq_idx: Tensor | None,
    split: Sequence[int],
) -> Form:
    """weight `by_taps`."""
    return Form(tuple(split), weight.shape[0], left, activate, bias is not None, mask is not None, seq_idx is not None)


def conv_forward(
    form: Form,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seq_idx: Tensor | None,
    out: list[Tensor],
) -> None:
    """Writes `out`, contiguous parts `(b, l, ...)`; x `(b, l, d)` with rows at one distance, its channels side by side;
    weight `by_taps`."""
    b, l, _ = x.shape
    _forward(form, x.device, b, l, row_stride(x))(
        x=x, weight=weight, bias=bias, mask=mask, seq=seq_idx, **_parts("out", out)
    )


def _constants(form: Form) -> dict[str, int]:
    """What both kernels are compiled for."""
    sizes = {f"D_{i}": form.split[i] if i < len(form.split) else 0 for i in range(5)}
    flags = dict(ACTIVATE=form.activate, HAS_BIAS=form.bias, HAS_MASK=form.mask, HAS_SEQ=form.seq)
    return sizes | flags | dict(WIDTH=form.width, LEFT=form.left)


@once_a_form
def _forward(form: Form, device: torch.device, b: int, l: int, stride: int) -> Launch:
    return Launch(
        conv_kernel,
        b * ceil_div(l, BLOCK_L) * _count(form.split),
        device,
        L=l,
        STRIDE=stride,
        **_constants(form),
        ROWS=BLOCK_L,
        COLUMNS=BLOCK_D,
        num_warps=4,
    )


def conv_backward(
    form: Form,
    dys: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seq_idx: Tensor | None,
    dx: Tensor,
) -> Tensor:
    """`(groups, width + 1, d)` fp32, which sums over the groups to dweight `by_taps` and dbias. `dx (b, l, d)` is
    written, with rows at one distance; weight `by_taps`."""
    b, l, d = x.shape
    launch, groups = _backward(form, x.device, b, l, row_stride(x), row_stride(dx))
    sums = torch.empty((groups, form.width + 1, d), dtype=torch.float32, device=x.device)
    launch(x=x, weight=weight, bias=bias, mask=mask, seq=seq_idx, **_parts("dy", dys), dx=dx, sums=sums)
    return sums


@once_a_form
def _backward(form: Form, device: torch.device, b: int, l: int, stride: int, stride_dx: int) -> tuple[Launch, int]:
    """The launch, and how many groups of walks write sums."""
    blocks = _count(form.split)
    enough = GRAD_PROGRAMS * GRAD_SIDE // max(1, b * blocks)  # b = 0: no walks, and no groups, which sum to zero
    chunks = min(ceil_div(l, GRAD_ROWS), max(1, enough))
    length = ceil_div(l, chunks)
    chunks = ceil_div(l, length)
    groups = ceil_div(b * chunks, GRAD_SIDE)
    launch = Launch(
        conv_grad_kernel,
        groups * blocks,
        device,
        L=l,
        WALKS=b * chunks,
        CHUNKS=chunks,
        LENGTH=length,
        STRIDE=stride,
        STRIDE_DX=stride_dx,
        **_constants(form),
        SIDE=GRAD_SIDE,
        COLUMNS=BLOCK_D,
        UNROLL=GRAD_UNROLL,
        num_warps=4,
    )
    return launch, groups
