"""Stage 3: dx, the direct part of d(delta), and the pieces of d(a) that pairs and leaving states give.

    du_j = exp(total - s_j) gF B_j + exp(e_j) gB B_j + sum_i (decay o C B^T)_ij dy_i,      dx_j = delta_j du_j + D dy_j

with gF, gB the gradients of the states that leave the rows to the right and to the left. A pair (i, j) that weighs
w_ij in y.dy gives w_ij to d(a_t) of every t between them: sums over sources minus sums over readers, summed up along
the chunk by `grad_dt.py`. They are summed in fp32 on the plain units: on the matrix units in bf16 the kernel is 8 %
faster and dA two to three times less exact. i == j gives the same to both sums: it needs no mask.

Written per row (`LINES`): 0 what is summed in reverse, inclusively; 1 what is summed forward, inclusively; 2 what a row
itself takes off, where a sum excludes it; 3 the direct part of d(delta).

Where the states are saved `gradients.py` launches both stages as one.
"""

# ruff: noqa: SIM108 - branches on constexpr flags compile one side only; ternaries and `and` would not

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba.ops.launch import Launch, once_a_form

from .choose import Config, Problem, gradient_settings
from .common import (
    ROW_LINES,
    both_ways,
    leftward,
    load_row,
    load_rows,
    load_state,
    load_tile,
    mixed_rows,
    of_sequence,
    reading,
    rightward,
    sequence_id,
    store_tile,
    sum_both,
    sum_three,
    within_sequences,
)
from .descriptors import line_tiles, tiles


@triton.jit
def grad_x_rows(
    i_b,
    i_c,
    i_half,
    i_g,
    i_first,
    STEP: tl.constexpr,
    o_l,
    o_far,
    x,
    dy,
    B,
    C,
    B_back,
    C_back,
    D,
    seq,
    grad_states,
    rows,
    sums,
    dx,
    lines,
    dD,
    L,
    CHUNKS,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HALVES: tl.constexpr,
    HEADS,
    LINES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    P2: tl.constexpr,
    N2: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr,
    UNTIED: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    HAS_D: tl.constexpr,
    D_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    ROW_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows `o_l ..` of HEADS heads of group `i_g`, every STEP-th from `i_first` on; the chunk's other half begins at
    `o_far`."""
    BLOCKS_P: tl.constexpr = P2 // BLOCK_P
    BLOCKS_N: tl.constexpr = N2 // BLOCK_N
    DIRECTIONS: tl.constexpr = 2 if BIDIRECTIONAL else 1
    SETS: tl.constexpr = 2 if UNTIED else 1
    TWO_MATRICES: tl.constexpr = BIDIRECTIONAL and (UNTIED or SHIFT)
    TIED: tl.constexpr = BIDIRECTIONAL and not TWO_MATRICES
    K: tl.constexpr = Q * HALVES
    HOIST: tl.constexpr = BLOCKS_N == 1  # B and C stay for all heads
    r = tl.arange(0, Q)
    i = r[None, :]  # readers run along the columns here
    j = r[:, None]
    if HAS_SEQ:
        p_seq = seq + i_b.to(tl.int64) * L
        mixed = mixed_rows(p_seq, i_c * K, L, K)
        if HALVES == 2:
            o_near = o_l + (1 - i_half) * (Q - 1)  # this half's row next to the other one
            m_cross = sequence_id(p_seq, o_far + (1 - i_half) * (Q - 1), L) == sequence_id(p_seq, o_near, L)
    if HOIST:
        B_0 = load_tile(B, i_b, o_l, i_g, L, G, 0, N, Q, BLOCK_N, TMA)
        C_0 = load_tile(C, i_b, (o_l - 1) if SHIFT else o_l, i_g, L, G, 0, N, Q, BLOCK_N, TMA)
        if TWO_MATRICES:
            Bb_0 = load_tile(B_back, i_b, o_l, i_g, L, G, 0, N, Q, BLOCK_N, TMA)
            Cb_0 = load_tile(C_back, i_b, (o_l + 1) if SHIFT else o_l, i_g, L, G, 0, N, Q, BLOCK_N, TMA)
        if HALVES == 2:
            Cf_0 = load_tile(C, i_b, o_far, i_g, L, G, 0, N, Q, BLOCK_N, TMA)
    if TIED:
        # C_j B_j: the diagonal counts once more than `both_ways` says
        twice = tl.zeros((Q,), tl.float32)
        for k in range(BLOCKS_N):
            b_B = B_0 if HOIST else load_tile(B, i_b, o_l, i_g, L, G, k * BLOCK_N, N, Q, BLOCK_N, TMA)
            b_C = C_0 if HOIST else load_tile(C, i_b, o_l, i_g, L, G, k * BLOCK_N, N, Q, BLOCK_N, TMA)
            twice += tl.sum(b_B.to(tl.float32) * b_C.to(tl.float32), 1)
    PADDED = CHUNKS * K
    # The scalars of the next head are loaded while this one is worked on: the pipeliner leaves them where they stand
    p_total = sums + (i_b.to(tl.int64) * H + i_first) * (SETS * ROW_LINES * PADDED) + o_l + Q - 1
    to_next = STEP * SETS * ROW_LINES * PADDED
    total_next = tl.load(p_total)
    if HAS_D and not D_CHANNELS:
        D_next = tl.load(D + i_first)
    for i_head in tl.range(0, HEADS, num_stages=STAGES, disable_licm=True):
        i_h = i_first + i_head * STEP
        i_state = ((i_b * CHUNKS + i_c) * H + i_h) * DIRECTIONS
        i_row = i_b.to(tl.int64) * H + i_h
        i_line = (i_b * H + i_h) * (SETS * ROW_LINES)
        total = total_next
        p_total += tl.where(i_head + 1 < HEADS, to_next, 0)
        total_next = tl.load(p_total)
        if HAS_D and not D_CHANNELS:
            D_head = D_next
            D_next = tl.load(D + tl.minimum(i_h + STEP, H - 1))
        s, e, delta = load_rows(rows, i_line, o_l, PADDED, Q, ROW_TMA)
        f, b = reading(s, e, SHIFT)
        e_back = e
        delta_back = delta
        if UNTIED:
            s_back, e_back, delta_back = load_rows(rows, i_line + ROW_LINES, o_l, PADDED, Q, ROW_TMA)
            _, b = reading(s_back, e_back, SHIFT)
        w_right = tl.exp2(total - s)  # to the right edge, where gF comes in
        w_left = tl.exp2(e_back)
        if HAS_SEQ:
            w_right = of_sequence(w_right, p_seq, o_l, o_l + Q - 1, L, mixed, Q)
            w_left = of_sequence(w_left, p_seq, o_l, o_l, L, mixed, Q)
        if HALVES == 2:
            # The gradient that comes in over the other half is moved over it first: gF for the first half, gB for the
            # second
            s_far = load_row(rows, i_line, o_far, PADDED, Q, ROW_TMA)
            e_far = load_row(rows, i_line + 1, o_far, PADDED, Q, ROW_TMA)
            total_far = tl.load(sums + i_row * (SETS * ROW_LINES * PADDED) + o_far + Q - 1)
            w_far = tl.exp2(tl.where(i_half == 0, s_far, total_far - e_far))
            cross = tl.exp2(total_far)
            if HAS_SEQ:
                w_far = of_sequence(w_far, p_seq, o_far, o_near, L, mixed, Q)
                cross = tl.where(m_cross, cross, 0.0)
            if not BIDIRECTIONAL:
                w_far = tl.where(i_half == 0, w_far, 0.0)
                cross = tl.where(i_half == 0, cross, 1.0)
            w_1 = tl.where(i_half == 0, w_right, w_left) if BIDIRECTIONAL else w_right
            w_2 = tl.where(i_half == 0, w_left, w_right)
        else:
            w_1 = w_right
            w_2 = w_left

        # C B^T, transposed and weighted: m (sources, readers). `m_back` is the part above the diagonal where B, C
        # differ
        cb = tl.zeros((Q, Q), tl.float32)
        cb_back = tl.zeros((Q, Q), tl.float32)
        for k in range(BLOCKS_N):
            if HOIST:
                b_B = B_0
                b_C = C_0
            else:
                b_B = load_tile(B, i_b, o_l, i_g, L, G, k * BLOCK_N, N, Q, BLOCK_N, TMA)
                b_C = load_tile(C, i_b, (o_l - 1) if SHIFT else o_l, i_g, L, G, k * BLOCK_N, N, Q, BLOCK_N, TMA)
            cb = tl.dot(b_B, tl.trans(b_C), cb, input_precision=PRECISION)
            if TWO_MATRICES:
                if HOIST:
                    b_B = Bb_0
                    b_C = Cb_0
                else:
                    b_B = load_tile(B_back, i_b, o_l, i_g, L, G, k * BLOCK_N, N, Q, BLOCK_N, TMA)
                    b_C = load_tile(
                        C_back, i_b, (o_l + 1) if SHIFT else o_l, i_g, L, G, k * BLOCK_N, N, Q, BLOCK_N, TMA
                    )
                cb_back = tl.dot(b_B, tl.trans(b_C), cb_back, input_precision=PRECISION)
        if TWO_MATRICES:
            m = cb * rightward(i, j, f[None, :], s[:, None], SHIFT)
            m_back = cb_back * leftward(i, j, b[None, :], e_back[:, None], SHIFT)
            if HAS_SEQ:
                m = within_sequences(m, p_seq, o_l, L, mixed, Q)
                m_back = within_sequences(m_back, p_seq, o_l, L, mixed, Q)
            m_all = (m * delta[:, None] + m_back * delta_back[:, None]) if UNTIED else (m + m_back)
        else:
            if BIDIRECTIONAL:
                m = cb * both_ways(f[None, :], b[None, :], s[:, None], e[:, None])
            else:
                m = cb * rightward(i, j, f[None, :], s[:, None], SHIFT)
            if HAS_SEQ:
                m = within_sequences(m, p_seq, o_l, L, mixed, Q)
            m_all = m

        # x dy^T, and each pair's weight at its reader (sum over sources) and at its source (sum over readers). All of
        # it
        # before du, so that the registers of m and w are free again
        xdy = tl.zeros((Q, Q), tl.float32)
        if BLOCKS_P == 1:
            x_0 = load_tile(x, i_b, o_l, i_h, L, H, 0, P, Q, BLOCK_P, TMA)
            dy_0 = load_tile(dy, i_b, o_l, i_h, L, H, 0, P, Q, BLOCK_P, TMA)
            xdy = tl.dot(x_0, tl.trans(dy_0), xdy, input_precision=PRECISION)
        else:
            for k_p in range(BLOCKS_P):
                b_x = load_tile(x, i_b, o_l, i_h, L, H, k_p * BLOCK_P, P, Q, BLOCK_P, TMA)
                b_dy = load_tile(dy, i_b, o_l, i_h, L, H, k_p * BLOCK_P, P, Q, BLOCK_P, TMA)
                xdy = tl.dot(b_x, tl.trans(b_dy), xdy, input_precision=PRECISION)
        w = xdy * m
        w_delta = w * delta[:, None]
        if TIED:
            # Both directions together, and one less the other: so there is one mask
            signed = tl.where(i > j, w_delta, -w_delta)
            reader, reader_signed = sum_both(w_delta, signed, 0)
            direct, source_signed = sum_both(w, signed, 1)
            upper = 0.5 * ((direct * delta - source_signed) - (reader - reader_signed))
            lower = reader_signed - source_signed - upper
        else:
            direct = tl.sum(w, 1)
            reader = tl.sum(w_delta, 0)
            lower = reader - direct * delta
        if TWO_MATRICES:
            w = xdy * m_back
            direct_back = tl.sum(w, 1)
            source_back = direct_back * delta_back
            upper = source_back - tl.sum(w * delta_back[:, None], 0)
        m_16 = m_all.to(dy.dtype if TMA else dy.dtype.element_ty)

        leave_1 = tl.zeros((Q,), tl.float32)
        leave_2 = tl.zeros((Q,), tl.float32)
        x_dy = tl.zeros((Q,), tl.float32)
        for k_p in range(BLOCKS_P):
            o_p = k_p * BLOCK_P
            if BLOCKS_P == 1:
                b_x = x_0
                b_dy = dy_0
            else:
                b_x = load_tile(x, i_b, o_l, i_h, L, H, o_p, P, Q, BLOCK_P, TMA)
                b_dy = load_tile(dy, i_b, o_l, i_h, L, H, o_p, P, Q, BLOCK_P, TMA)
            if HALVES == 2:
                dy_far = load_tile(dy, i_b, o_far, i_h, L, H, o_p, P, Q, BLOCK_P, TMA)
                dy_far = tl.trans((dy_far * w_far[:, None]).to(dy_far.dtype))
            du_1 = tl.zeros((Q, BLOCK_P), tl.float32)
            du_2 = tl.zeros((Q, BLOCK_P), tl.float32)
            for k in range(BLOCKS_N):
                o_n = k * BLOCK_N
                if HOIST:
                    b_B = B_0
                    b_Bb = Bb_0 if TWO_MATRICES else B_0
                else:
                    b_B = load_tile(B, i_b, o_l, i_g, L, G, o_n, N, Q, BLOCK_N, TMA)
                    b_Bb = b_B
                    if UNTIED:
                        b_Bb = load_tile(B_back, i_b, o_l, i_g, L, G, o_n, N, Q, BLOCK_N, TMA)
                if HALVES == 2:
                    moving = i_state + ((1 - i_half) if BIDIRECTIONAL else 0)
                    g_1 = load_state(grad_states, moving, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
                    if HOIST:
                        C_far = Cf_0
                    else:
                        C_far = load_tile(C, i_b, o_far, i_g, L, G, o_n, N, Q, BLOCK_N, TMA)
                    g_1 = tl.dot(dy_far, C_far, g_1.to(tl.float32) * cross, input_precision=PRECISION).to(b_B.dtype)
                    i_2 = i_state + i_half
                else:
                    i_1 = i_state + (DIRECTIONS - 1)
                    g_1 = load_state(grad_states, i_1, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
                    i_2 = i_state
                du_1 = tl.dot(b_B, tl.trans(g_1), du_1, input_precision=PRECISION)
                if BIDIRECTIONAL:
                    g_2 = load_state(grad_states, i_2, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
                    du_2 = tl.dot(b_Bb, tl.trans(g_2), du_2, input_precision=PRECISION)
            x_f32 = b_x.to(tl.float32)
            dy_f32 = b_dy.to(tl.float32)
            if BIDIRECTIONAL:
                sum_1, sum_2, sum_D = sum_three(x_f32 * du_1, x_f32 * du_2, x_f32 * dy_f32, 1)
                leave_2 += sum_2
            else:
                sum_1, sum_D = sum_both(x_f32 * du_1, x_f32 * dy_f32, 1)
            leave_1 += sum_1
            x_dy += sum_D
            if UNTIED:
                b_dx = du_1 * (w_1 * delta)[:, None] + du_2 * (w_2 * delta_back)[:, None]
                b_dx = tl.dot(m_16, b_dy, b_dx, input_precision=PRECISION)
            else:
                du = du_1 * w_1[:, None]
                if BIDIRECTIONAL:
                    du += du_2 * w_2[:, None]
                b_dx = tl.dot(m_16, b_dy, du, input_precision=PRECISION) * delta[:, None]
            skip = (twice * delta)[:, None] if TIED else 0.0
            if HAS_D:
                o_c = o_p + tl.arange(0, BLOCK_P)
                if D_CHANNELS:
                    skip += tl.load(D + i_h * P + o_c, mask=o_c < P, other=0.0)[None, :]
                    p_dD = dD + ((i_b * CHUNKS * HALVES + i_c * HALVES + i_half).to(tl.int64) * H + i_h) * P + o_c
                    tl.store(p_dD, tl.sum(x_f32 * dy_f32, 0), mask=o_c < P)
                else:
                    skip += D_head
            if HAS_D or TIED:
                b_dx += dy_f32 * skip
            store_tile(dx, b_dx, i_b, o_l, i_h, L, H, o_p, P, Q, BLOCK_P, TMA)
        if HAS_D and not D_CHANNELS:
            tl.store(dD + (i_b * CHUNKS * HALVES + i_c * HALVES + i_half).to(tl.int64) * H + i_h, tl.sum(x_dy, 0))
        leave_1 *= w_1
        leave_2 *= w_2
        if HALVES == 2 and BIDIRECTIONAL:
            leave_right = tl.where(i_half == 0, leave_1, leave_2)
            leave_left = tl.where(i_half == 0, leave_2, leave_1)
        else:
            leave_right = leave_1
            leave_left = leave_2

        p_line = lines + i_row * SETS * LINES * PADDED + o_l + r
        direct += leave_right
        leave_right *= delta
        if TIED:
            direct += leave_left + twice * x_dy
        lower_self = leave_right
        if SHIFT:
            lower_self += reader
        if BIDIRECTIONAL:
            if TWO_MATRICES:
                direct_back += leave_left
            leave_left *= delta_back
            upper += leave_left
            upper_self = (source_back + leave_left) if SHIFT else upper
        if UNTIED:
            p_back = p_line + LINES * PADDED
            tl.store(p_back, upper)
            tl.store(p_back + PADDED, tl.zeros((Q,), tl.float32))
            tl.store(p_back + 2 * PADDED, -upper_self)
            tl.store(p_back + 3 * PADDED, direct_back)
        elif BIDIRECTIONAL:
            lower += upper
            lower_self += upper_self
            if TWO_MATRICES:
                direct += direct_back
        tl.store(p_line, lower)
        tl.store(p_line + PADDED, leave_right)
        tl.store(p_line + 2 * PADDED, -lower_self)
        tl.store(p_line + 3 * PADDED, direct)


@triton.jit(do_not_specialize=["L", "CHUNKS", "HEADS"])
def grad_x_kernel(
    x,
    dy,
    B,
    C,
    B_back,
    C_back,
    D,
    seq,
    grad_states,
    rows,
    sums,
    dx,
    lines,
    dD,
    L,
    CHUNKS,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HALVES: tl.constexpr,
    HEADS,
    LINES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    P2: tl.constexpr,
    N2: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr,
    UNTIED: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    HAS_D: tl.constexpr,
    D_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    ROW_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    K: tl.constexpr = Q * HALVES
    pid = tl.program_id(0)
    i_half = pid % HALVES
    pid //= HALVES
    i_first = (pid % (H // HEADS)) * HEADS
    pid //= H // HEADS
    i_c = pid % CHUNKS
    i_b = pid // CHUNKS
    o_l = i_c * K + i_half * Q
    o_far = i_c * K + (1 - i_half) * Q
    if o_l >= L:
        return
    i_g = i_first // (H // G)
    grad_x_rows(
        i_b, i_c, i_half, i_g, i_first, 1, o_l, o_far, x, dy, B, C, B_back, C_back, D, seq, grad_states, rows, sums, dx,
        lines, dD, L, CHUNKS, H, G, P, N, Q, HALVES, HEADS, LINES, BLOCK_P, BLOCK_N, P2, N2, BIDIRECTIONAL, UNTIED,
        SHIFT, HAS_SEQ, HAS_D, D_CHANNELS, STAGES, TMA, ROW_TMA, PRECISION,
    )  # fmt: skip


class GradX(NamedTuple):
    """dx `(b, l, h, p)`, and dD in parts `(b * row blocks, h)` or `(b * row blocks, h, p)`."""

    dx: Tensor
    dD: Tensor | None


def grad_x(
    problem: Problem,
    config: Config,
    x: Tensor,
    dy: Tensor,
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
    grad_states: Tensor,
    rows: Tensor,
    lines: Tensor,
    *,
    D: Tensor | None,
    seq_idx: Tensor | None,
) -> GradX:
    """B, C: pairs (forward, backward). Writes lines 0-3 of `lines` (see `grad_dt.py`)."""
    dx, dD = room_for_x(problem, config, x, D)
    two = problem.two_matrices
    _launch(problem, config, 0 if D is None else D.dim(), seq_idx is not None)(
        x=x,
        dy=dy,
        B=B[0],
        C=C[0],
        B_back=B[1] if two else None,
        C_back=C[1] if two else None,
        D=D,
        seq=seq_idx,
        grad_states=grad_states,
        rows=rows,
        sums=rows,
        dx=dx,
        lines=lines,
        dD=dD,
    )
    return GradX(dx, dD)


def room_for_x(problem: Problem, config: Config, x: Tensor, D: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """For dx and dD."""
    dx = torch.empty_like(x)
    if D is None:
        return dx, None
    # A row block that lies wholly beyond the end is left out: its part must read as zero
    row_blocks = problem.row_blocks(config)
    make = torch.empty if problem.b * problem.parts(config) == row_blocks else torch.zeros
    return dx, make((row_blocks, *D.shape), dtype=torch.float32, device=x.device)


def x_settings(problem: Problem, config: Config, dims_D: int) -> dict[str, Any]:
    """What the kernel of dx takes besides `gradient_settings`. `dims_D`: 0 where there is no D."""
    settings = dict(BIDIRECTIONAL=problem.bidirectional, UNTIED=problem.untied, ROW_TMA=has_row_tma(config))
    return settings | dict(HAS_D=dims_D > 0, D_CHANNELS=dims_D == 2)


def has_row_tma(config: Config) -> bool:
    """Whether descriptors fetch the sums and step sizes, too."""
    return config.tma and config.grad_x_row_tma


@once_a_form
def _launch(problem: Problem, config: Config, dims_D: int, seq: bool) -> Launch:
    """`dims_D`: 0 where there is no D. `seq`: whether it is there."""
    q = config.rows
    wide = tiles((problem.b, problem.l, problem.h, problem.p), q, config.block_p)
    narrow = tiles((problem.b, problem.l, problem.g, problem.n), q, config.block_n)
    states = line_tiles(problem.states_shape(config), config.block_p, config.block_n)
    descriptors = dict(x=wide, dy=wide, dx=wide, grad_states=states)
    descriptors |= dict(B=narrow, C=narrow, B_back=narrow, C_back=narrow)
    if has_row_tma(config):
        descriptors["rows"] = line_tiles(problem.rows_shape(config), 1, q)
    return Launch(
        grad_x_kernel,
        problem.row_blocks(config) * (problem.h // config.grad_x_heads),
        problem.device,
        descriptors if config.tma else {},
        **gradient_settings(problem, config, seq),
        **x_settings(problem, config, dims_D),
        HEADS=config.grad_x_heads,
        BLOCK_N=config.block_n,
        STAGES=config.grad_x_stages,
    )
