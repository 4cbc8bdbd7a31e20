"""Stage 5: d(dt), and dA and d(dt_bias) in parts.

    da_t = sum_{t' >= t} lines_0 + sum_{t' <= t} lines_1 + lines_2 + crossing,    d(delta_t) = A da_t + lines_3

summed within the rows that one program of the earlier stages owns: whatever crosses their edges is in the states.
d(dt) passes through clamp (zero where it clamped) and softplus. `lines (b, h, sets, 4 + 2 blocks_n, padded l)`: see
`grad_x.py` and `grad_bc.py`; what the readers of a state give (4..) adds to 0 forward and to 1 backward, and excludes
the reader's own row when shifted.
"""

import triton
import triton.language as tl
from torch import Tensor

from bimamba.ops.launch import Launch, ceil_div, once_a_form, row_stride

from .choose import Config, Problem
from .common import ROW_LINES, softplus


@triton.jit(do_not_specialize=["L", "PADDED", "PARTS", "SLOTS"])
def grad_dt_kernel(
    dt,
    A,
    bias,
    mask,
    rows,
    lines,
    crossing,
    ddt,
    sums,
    least,
    largest,
    L,
    PADDED,
    PARTS,
    SLOTS,
    H: tl.constexpr,
    Q: tl.constexpr,
    HEADS: tl.constexpr,
    SET: tl.constexpr,
    SETS: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    CROSSINGS: tl.constexpr,
    SHIFT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDE_DDT: tl.constexpr,
):
    LINES: tl.constexpr = 4 + 2 * BLOCKS_N
    HEAD_BLOCKS: tl.constexpr = (H + HEADS - 1) // HEADS
    pid = tl.program_id(0)
    i_h = (pid % HEAD_BLOCKS) * HEADS + tl.arange(0, HEADS)
    pid //= HEAD_BLOCKS
    i_part = pid % PARTS
    i_b = (pid // PARTS).to(tl.int64)
    o_l = i_part * Q + tl.arange(0, Q)
    m_h = i_h < H
    m = m_h[:, None] & (o_l < L)[None, :]
    i_row = (i_b * H + i_h) * SETS + SET
    delta = tl.load(rows + ((i_row * ROW_LINES + 2) * PADDED)[:, None] + o_l[None, :], mask=m, other=0.0)
    p_line = lines + (i_row * LINES * PADDED)[:, None] + o_l[None, :]
    in_reverse = tl.load(p_line, mask=m, other=0.0)
    in_order = tl.load(p_line + PADDED, mask=m, other=0.0)
    own = tl.load(p_line + 2 * PADDED, mask=m, other=0.0)
    direct = tl.load(p_line + 3 * PADDED, mask=m, other=0.0)
    i_slot = i_b * SLOTS + i_part
    p_cross = crossing + (i_slot * H + i_h) * 2 * BLOCKS_N + (0 if FORWARD else BLOCKS_N)
    crossed = tl.zeros((HEADS,), tl.float32)
    for k in tl.static_range(BLOCKS_N):
        crossed += tl.load(p_cross + k, mask=m_h, other=0.0)
        if CROSSINGS == 2:
            crossed += tl.load(p_cross + BLOCKS_N + k, mask=m_h, other=0.0)
        if FORWARD:
            read = tl.load(p_line + (4 + k) * PADDED, mask=m, other=0.0)
            in_reverse += read
            if SHIFT:
                own -= read
        if BACKWARD:
            read = tl.load(p_line + (4 + BLOCKS_N + k) * PADDED, mask=m, other=0.0)
            in_order += read
            if SHIFT:
                own -= read
    da = tl.cumsum(in_reverse, 1, reverse=True) + tl.cumsum(in_order, 1) + own + crossed[:, None]

    o_row = (i_b * L + o_l)[None, :]
    v = tl.load(dt + o_row * STRIDE + i_h[:, None], mask=m, other=0.0).to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias + i_h, mask=m_h, other=0.0)[:, None]
    grad = da * tl.load(A + i_h, mask=m_h, other=0.0)[:, None] + direct
    if LIMITED:
        unclamped = softplus(v) if SOFTPLUS else v
        grad = tl.where((unclamped < least) | (unclamped > largest), 0.0, grad)
    if SOFTPLUS:
        grad = grad / (1.0 + tl.exp(-v))
    grad = tl.where(m, grad, 0.0)
    if HAS_MASK:
        grad = tl.where((tl.load(mask + i_b * L + o_l, mask=o_l < L, other=0) != 0)[None, :], grad, 0.0)
    tl.store(ddt + o_row * STRIDE_DDT + i_h[:, None], grad.to(ddt.dtype.element_ty), mask=m)
    p_sums = sums + ((i_b * PARTS + i_part) * 2 * SETS + SET) * H + i_h
    tl.store(p_sums, tl.sum(tl.where(m, da * delta, 0.0), 1), mask=m_h)
    tl.store(p_sums + SETS * H, tl.sum(grad, 1), mask=m_h)


def grad_dt(
    problem: Problem,
    config: Config,
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    rows: Tensor,
    lines: Tensor,
    crossing: Tensor,
    ddt: Tensor,
    sums: Tensor,
    *,
    forward: bool,
    backward: bool,
) -> None:
    """Writes ddt `(b, l, h)`, its rows at one distance, and into `sums (b * parts, 2, sets * h)` fp32 dA and d(dt_bias)
    in parts: those of one set of parameters, of both directions or of one."""
    flags = (forward, backward, bias is not None, mask is not None)
    _launch(problem, config, row_stride(dt), row_stride(ddt), *flags)(
        dt=dt,
        A=A,
        bias=bias,
        mask=mask,
        rows=rows,
        lines=lines,
        crossing=crossing,
        ddt=ddt,
        sums=sums,
    )


@once_a_form
def _launch(
    problem: Problem,
    config: Config,
    stride: int,
    stride_ddt: int,
    forward: bool,
    backward: bool,
    bias: bool,
    mask: bool,
) -> Launch:
    parts, heads = problem.parts(config), 8
    return Launch(
        grad_dt_kernel,
        problem.b * parts * ceil_div(problem.h, heads),
        problem.device,
        least=float(problem.dt_limit[0]),
        largest=float(problem.dt_limit[1]),
        L=problem.l,
        PADDED=problem.chunks(config) * config.chunk,
        PARTS=parts,
        SLOTS=problem.chunks(config) * config.halves,
        H=problem.h,
        Q=config.rows,
        HEADS=heads,
        SET=1 if problem.untied and not forward else 0,
        SETS=problem.sets,
        FORWARD=forward,
        BACKWARD=backward,
        BLOCKS_N=problem.n2 // config.grad_bc_block_n,
        CROSSINGS=2 if problem.two_matrices and not problem.untied else 1,
        SHIFT=problem.shift,
        SOFTPLUS=problem.dt_softplus,
        LIMITED=problem.limited,
        HAS_BIAS=bias,
        HAS_MASK=mask,
        STRIDE=stride,
        STRIDE_DDT=stride_ddt,
        num_warps=4,
    )
