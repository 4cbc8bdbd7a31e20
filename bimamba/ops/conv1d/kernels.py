"""Triton kernels of the convolution: rows of channels, each tap a load that the caches serve.

A program owns (batch row, rows, channels). The forward pass writes up to five tensors of their own, so that the scan
finds x, B and C contiguous. The gradient takes two launches: through the activation, with the sums for weight and bias,
and the same convolution with its taps reversed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ceil_div, launch

BLOCK_L, BLOCK_D = 64, 64
# The gradient sums over rows in registers: few rows a step, so that a sum for each tap fits
GRAD_L, GRAD_PROGRAMS = 16, 2048


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
    for k in tl.static_range(WIDTH):
        w = tl.load(weight + k * D + o_c, mask=m_c, other=0.0).to(tl.float32)
        acc += _tap(p_x, r, k - LEFT, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, HAS_MASK, HAS_SEQ) * w[None, :]
    if ACTIVATE:
        acc = acc / (1.0 + tl.exp(-acc))
    o = (i_b * L + r)[:, None] * width + o_out[None, :]
    tl.store(out + o, acc.to(out.dtype.element_ty), mask=(r < L)[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["L", "STEPS", "SPLITS"])
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
    dv,
    sums,
    L,
    STEPS,
    SPLITS,
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
    """dv, the gradient before the activation, and the sums of weight and bias over STEPS blocks of rows."""
    BLOCKS = _blocks(D_0, D_1, D_2, D_3, D_4, COLUMNS)
    D: tl.constexpr = D_0 + D_1 + D_2 + D_3 + D_4
    pid = tl.program_id(0)
    i_d = pid % BLOCKS
    pid //= BLOCKS
    i_split = pid % SPLITS
    i_b = (pid // SPLITS).to(tl.int64)
    dy, first, width, i_d = _part(i_d, dy_0, dy_1, dy_2, dy_3, dy_4, D_0, D_1, D_2, D_3, D_4, COLUMNS)
    o_d = i_d * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_d < width
    o_c = first + o_d
    p_x = x + i_b * L * STRIDE
    p_mask = mask + i_b * L if HAS_MASK else mask
    p_seq = seq + i_b * L if HAS_SEQ else seq
    b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros((COLUMNS,), tl.float32)
    # Sums stay apart by row until the end: a reduction for every tap and step would cost more than all the rest
    zeros = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_0 = zeros
    sum_1 = zeros
    sum_2 = zeros
    sum_3 = zeros
    sum_4 = zeros
    sum_5 = zeros
    sum_6 = zeros
    sum_7 = zeros
    sum_8 = zeros
    sum_bias = zeros
    for step in range(STEPS):
        r = (i_split * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m = (r < L)[:, None] & m_c[None, :]
        ids = tl.load(p_seq + r, mask=r < L, other=-1) if HAS_SEQ else r
        g = tl.load(dy + (i_b * L + r)[:, None] * width + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        if ACTIVATE:
            v = tl.zeros((ROWS, COLUMNS), tl.float32) + b_bias[None, :]
            for k in tl.static_range(WIDTH):
                w = tl.load(weight + k * D + o_c, mask=m_c, other=0.0).to(tl.float32)
                v += _tap(p_x, r, k - LEFT, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, HAS_MASK, HAS_SEQ) * w[None, :]
            sigmoid = 1.0 / (1.0 + tl.exp(-v))
            g *= sigmoid * (1.0 + v * (1.0 - sigmoid))
        tl.store(dv + (i_b * L + r)[:, None] * D + o_c[None, :], g.to(dv.dtype.element_ty), mask=m)
        sum_0 += g * _tap(p_x, r, 0 - LEFT, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, HAS_MASK, HAS_SEQ)
        sum_1 += g * _tap(p_x, r, 1 - LEFT, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, HAS_MASK, HAS_SEQ)
        if WIDTH > 2:
            sum_2 += g * _tap(p_x, r, 2 - LEFT, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, HAS_MASK, HAS_SEQ)
        if WIDTH > 3:
            sum_3 += g * _tap(p_x, r, 3 - LEFT, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, HAS_MASK, HAS_SEQ)
        if WIDTH > 4:
            sum_4 += g * _tap(p_x, r, 4 - LEFT, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, HAS_MASK, HAS_SEQ)
        if WIDTH > 5:
            sum_5 += g * _tap(p_x, r, 5 - LEFT, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, HAS_MASK, HAS_SEQ)
        if WIDTH > 6:
            sum_6 += g * _tap(p_x, r, 6 - LEFT, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, HAS_MASK, HAS_SEQ)
        if WIDTH > 7:
            sum_7 += g * _tap(p_x, r, 7 - LEFT, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, HAS_MASK, HAS_SEQ)
        if WIDTH > 8:
            sum_8 += g * _tap(p_x, r, 8 - LEFT, o_c, m_c, ids, p_mask, p_seq, L, STRIDE, HAS_MASK, HAS_SEQ)
        if HAS_BIAS:
            sum_bias += g
    p_sums = sums + (i_b * SPLITS + i_split) * (WIDTH + 1) * D + o_c
    tl.store(p_sums + 0 * D, tl.sum(sum_0, 0), mask=m_c)
    tl.store(p_sums + 1 * D, tl.sum(sum_1, 0), mask=m_c)
    if WIDTH > 2:
        tl.store(p_sums + 2 * D, tl.sum(sum_2, 0), mask=m_c)
    if WIDTH > 3:
        tl.store(p_sums + 3 * D, tl.sum(sum_3, 0), mask=m_c)
    if WIDTH > 4:
        tl.store(p_sums + 4 * D, tl.sum(sum_4, 0), mask=m_c)
    if WIDTH > 5:
        tl.store(p_sums + 5 * D, tl.sum(sum_5, 0), mask=m_c)
    if WIDTH > 6:
        tl.store(p_sums + 6 * D, tl.sum(sum_6, 0), mask=m_c)
    if WIDTH > 7:
        tl.store(p_sums + 7 * D, tl.sum(sum_7, 0), mask=m_c)
    if WIDTH > 8:
        tl.store(p_sums + 8 * D, tl.sum(sum_8, 0), mask=m_c)
    if HAS_BIAS:
        tl.store(p_sums + WIDTH * D, tl.sum(sum_bias, 0), mask=m_c)


@triton.jit(do_not_specialize=["L"])
def conv_transposed_kernel(
    dv,
    weight,
    mask,
    seq,
    dx,
    L,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx_j = sum_k weight[:, k] dv[j - k + left]; nothing at padding."""
    BLOCKS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    pid = tl.program_id(0)
    o_c = (pid % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    pid //= BLOCKS
    row_blocks = tl.cdiv(L, ROWS)
    r = (pid % row_blocks) * ROWS + tl.arange(0, ROWS)
    i_b = (pid // row_blocks).to(tl.int64)
    m_c = o_c < D
    p_seq = seq + i_b * L if HAS_SEQ else seq
    ids = tl.load(p_seq + r, mask=r < L, other=-1) if HAS_SEQ else r
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.static_range(WIDTH):
        w = tl.load(weight + k * D + o_c, mask=m_c, other=0.0).to(tl.float32)
        acc += _tap(dv + i_b * L * D, r, LEFT - k, o_c, m_c, ids, mask, p_seq, L, D, False, HAS_SEQ) * w[None, :]
    if HAS_MASK:
        acc = tl.where((tl.load(mask + i_b * L + r, mask=r < L, other=0) != 0)[:, None], acc, 0.0)
    o = (i_b * L + r)[:, None] * STRIDE + o_c[None, :]
    tl.store(dx + o, acc.to(dx.dtype.element_ty), mask=(r < L)[:, None] & m_c[None, :])


def _parts(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}_{i}": tensors[min(i, len(tensors) - 1)] for i in range(5)}


def _sizes(split: list[int]) -> dict[str, int]:
    return {f"D_{i}": split[i] if i < len(split) else 0 for i in range(5)}


def _count(split: list[int]) -> int:
    return sum(ceil_div(size, BLOCK_D) for size in split)


def _by_taps(weight: Tensor) -> Tensor:
    """`(width, d)`: with the taps innermost every weight would be a load of its own, and those the kernels' bound."""
    return weight.t().contiguous()


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activate: bool,
    left: int,
    mask: Tensor | None,
    seq_idx: Tensor | None,
    split: list[int],
) -> list[Tensor]:
    """`[(b, l, size), ...]`; x `(b, l, d)` with rows at one distance and its channels side by side."""
    b, l, _ = x.shape
    width = weight.shape[1]
    out = [torch.empty((b, l, size), dtype=x.dtype, device=x.device) for size in split]
    launch(
        conv_kernel,
        b * ceil_div(l, BLOCK_L) * _count(split),
        x.device,
        x=x,
        weight=_by_taps(weight),
        bias=bias,
        mask=mask,
        seq=seq_idx,
        **_parts("out", out),
        L=l,
        STRIDE=x.stride(1),
        **_sizes(split),
        WIDTH=width,
        LEFT=left,
        ACTIVATE=activate,
        HAS_BIAS=bias is not None,
        HAS_MASK=mask is not None,
        HAS_SEQ=seq_idx is not None,
        ROWS=BLOCK_L,
        COLUMNS=BLOCK_D,
        num_warps=4,
    )
    return out


def conv_backward(
    dys: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activate: bool,
    left: int,
    mask: Tensor | None,
    seq_idx: Tensor | None,
    dx: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """`dweight (d, width)` and `dbias (d)`, fp32; `dx (b, l, d)` is written, with rows at one distance."""
    b, l, d = x.shape
    width = weight.shape[1]
    dv = torch.empty((b, l, d), dtype=x.dtype, device=x.device)
    split = [dy.shape[2] for dy in dys]
    blocks = ceil_div(l, GRAD_L)
    splits = min(blocks, max(1, GRAD_PROGRAMS // (b * _count(split))))
    steps = ceil_div(blocks, splits)
    splits = ceil_div(blocks, steps)
    sums = torch.empty((b * splits, width + 1, d), dtype=torch.float32, device=x.device)
    common = dict(
        WIDTH=width,
        LEFT=left,
        HAS_MASK=mask is not None,
        HAS_SEQ=seq_idx is not None,
        COLUMNS=BLOCK_D,
        num_warps=4,
    )
    by_taps = _by_taps(weight)
    launch(
        conv_grad_kernel,
        b * splits * _count(split),
        x.device,
        x=x,
        weight=by_taps,
        bias=bias,
        mask=mask,
        seq=seq_idx,
        **_parts("dy", dys),
        dv=dv,
        sums=sums,
        L=l,
        STEPS=steps,
        SPLITS=splits,
        STRIDE=x.stride(1),
        **_sizes(split),
        ACTIVATE=activate,
        HAS_BIAS=bias is not None,
        ROWS=GRAD_L,
        **common,
    )
    launch(
        conv_transposed_kernel,
        b * ceil_div(l, BLOCK_L) * ceil_div(d, BLOCK_D),
        x.device,
        dv=dv,
        weight=by_taps,
        mask=mask,
        seq=seq_idx,
        dx=dx,
        L=l,
        STRIDE=dx.stride(1),
        D=d,
        ROWS=BLOCK_L,
        **common,
    )
    total = sums.sum(0)
    return total[:width].t(), total[width] if bias is not None else None
