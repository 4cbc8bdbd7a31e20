"""Stage 4: dB and dC, and the pieces of d(a) that entering states give.

    dB_j = sum_h exp(total - s_j) delta_j gF^T x_j + exp(e_j) delta_j gB^T x_j + sum_i dM_ji C_i
    dC_i = sum_h exp(f_i) S_left^T dy_i + exp(total - b_i) S_right^T dy_i     + sum_j dM_ji B_j
    dM_ji = sum_h (x_j . dy_i) decay_ij delta_j

One program owns (batch row, rows of a chunk, group[, part of its heads][, block of n]) and sums over the heads in
registers; with several parts they are summed by `reduce.py`, in a fixed order, so that two runs give the same bits.
Tied directions share one dM; otherwise a program takes one side (FORWARD or BACKWARD) with that side's parameters.
Where the states are saved `gradients.py` launches both stages as one.

Lines (see `grad_x.py`), one a block of n: 4.. of the forward state's readers, then of the backward state's readers.
`crossing` is <S, g> of the states that cross the rows without being touched: it counts for every row's d(a).
"""

from typing import NamedTuple

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
    load_rows,
    load_state,
    load_tile,
    mixed_rows,
    of_sequence,
    reading,
    rightward,
    sequence_id,
    store_tile,
    within_sequences,
)
from .descriptors import line_tiles, tiles
from .reduce import reduce_parts


@triton.jit
def grad_bc_rows(
    i_b,
    i_c,
    i_half,
    i_n,
    i_g,
    i_part,
    i_first,
    STEP: tl.constexpr,
    o_n,
    o_l,
    o_far,
    x,
    dy,
    B,
    C,
    seq,
    states,
    grad_states,
    rows,
    dB,
    dC,
    lines,
    crossing,
    L,
    CHUNKS,
    NB,
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
    DIRECTIONS: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    SETS: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows `o_l ..` of HEADS heads of group `i_g`, every STEP-th from `i_first` on; the chunk's other half begins at
    `o_far`."""
    BLOCKS_P: tl.constexpr = P2 // BLOCK_P
    BLOCKS_N: tl.constexpr = N2 // BLOCK_N
    BOTH: tl.constexpr = FORWARD and BACKWARD
    SET: tl.constexpr = 1 if (SETS == 2 and BACKWARD) else 0
    K: tl.constexpr = Q * HALVES
    r = tl.arange(0, Q)
    i = r[None, :]
    j = r[:, None]
    if HAS_SEQ:
        p_seq = seq + i_b.to(tl.int64) * L
        mixed = mixed_rows(p_seq, i_c * K, L, K)
        m_own = sequence_id(p_seq, o_l, L) == sequence_id(p_seq, o_l + Q - 1, L)
        if HALVES == 2:
            o_near = o_l + (1 - i_half) * (Q - 1)  # this half's row next to the other one
            m_cross = sequence_id(p_seq, o_far + (1 - i_half) * (Q - 1), L) == sequence_id(p_seq, o_near, L)
    o_C = (o_l - 1 if FORWARD else o_l + 1) if SHIFT else o_l
    if HALVES == 2:
        B_far = load_tile(B, i_b, o_far, i_g, L, G, o_n, N, Q, BLOCK_N, TMA)
        C_far = load_tile(C, i_b, o_far, i_g, L, G, o_n, N, Q, BLOCK_N, TMA)
    acc_B = tl.zeros((Q, BLOCK_N), tl.float32)
    acc_C = tl.zeros((Q, BLOCK_N), tl.float32)
    dM = tl.zeros((Q, Q), tl.float32)
    PADDED = CHUNKS * K
    # The scalars of the next head are loaded while this one is worked on: the pipeliner leaves them where they stand
    p_total = rows + ((i_b.to(tl.int64) * H + i_first) * SETS + SET) * (ROW_LINES * PADDED) + o_l + Q - 1
    to_next = STEP * SETS * ROW_LINES * PADDED
    total_next = tl.load(p_total)
    for i_head in tl.range(0, HEADS, num_stages=STAGES, disable_licm=True):
        i_h = i_first + i_head * STEP
        i_state = ((i_b * CHUNKS + i_c) * H + i_h) * DIRECTIONS
        i_row = i_b.to(tl.int64) * H + i_h
        i_line = ((i_b * H + i_h) * SETS + SET) * ROW_LINES
        total = total_next
        p_total += tl.where(i_head + 1 < HEADS, to_next, 0)
        total_next = tl.load(p_total)
        s, e, delta = load_rows(rows, i_line, o_l, PADDED, Q, False)
        f, b = reading(s, e, SHIFT)
        to_right = tl.exp2(total - s) * delta
        to_left = tl.exp2(e) * delta
        from_left = tl.exp2(f)
        from_right = tl.exp2(total - b)
        cross = tl.exp2(total)
        if HAS_SEQ:
            to_right = of_sequence(to_right, p_seq, o_l, o_l + Q - 1, L, mixed, Q)
            to_left = of_sequence(to_left, p_seq, o_l, o_l, L, mixed, Q)
            from_left = of_sequence(from_left, p_seq, o_l, o_l, L, mixed, Q)
            from_right = of_sequence(from_right, p_seq, o_l, o_l + Q - 1, L, mixed, Q)
            cross = tl.where(m_own, cross, 0.0)
        if HALVES == 2:
            # First half: S_right and gF come in over the second half. Second half: S_left and gB over the first
            s_far, e_far, delta_far = load_rows(rows, i_line, o_far, PADDED, Q, False)
            total_far = tl.load(rows + (i_row * SETS + SET) * (ROW_LINES * PADDED) + o_far + Q - 1)
            w_x = tl.exp2(tl.where(i_half == 0, e_far, total_far - s_far)) * delta_far
            w_dy = tl.exp2(tl.where(i_half == 0, s_far, total_far - e_far))
            cross_far = tl.exp2(total_far)
            if HAS_SEQ:
                w_x = of_sequence(w_x, p_seq, o_far, o_near, L, mixed, Q)
                w_dy = of_sequence(w_dy, p_seq, o_far, o_near, L, mixed, Q)
                cross_far = tl.where(m_cross, cross_far, 0.0)
            cross_x = cross_far
            cross_dy = cross_far
            if not BOTH:
                w_x = tl.where(i_half == 0, 0.0, w_x)
                cross_x = tl.where(i_half == 0, 1.0, cross_x)
                w_dy = tl.where(i_half == 0, w_dy, 0.0)
                cross_dy = tl.where(i_half == 0, cross_dy, 1.0)
        # 1: what is moved over the other half (forward side if there are no halves), 2: the other side
        if HALVES == 2 and BOTH:
            to_1 = tl.where(i_half == 0, to_right, to_left)
            to_2 = tl.where(i_half == 0, to_left, to_right)
            from_1 = tl.where(i_half == 0, from_right, from_left)
            from_2 = tl.where(i_half == 0, from_left, from_right)
        else:
            to_1 = to_right if FORWARD else to_left
            from_1 = from_left if FORWARD else from_right
            to_2 = to_left
            from_2 = from_right

        b_C = load_tile(C, i_b, o_C, i_g, L, G, o_n, N, Q, BLOCK_N, TMA)
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
        if BOTH:
            w = both_ways(f[None, :], b[None, :], s[:, None], e[:, None])
        elif FORWARD:
            w = rightward(i, j, f[None, :], s[:, None], SHIFT)
        else:
            w = leftward(i, j, b[None, :], e[:, None], SHIFT)
        if HAS_SEQ:
            w = within_sequences(w, p_seq, o_l, L, mixed, Q)
        dM += xdy * (w * delta[:, None])

        read_1 = tl.zeros((Q,), tl.float32)
        read_2 = tl.zeros((Q,), tl.float32)
        crossed = 0.0
        for k_p in range(BLOCKS_P):
            o_p = k_p * BLOCK_P
            if BLOCKS_P == 1:
                b_x = x_0
                b_dy = dy_0
            else:
                b_x = load_tile(x, i_b, o_l, i_h, L, H, o_p, P, Q, BLOCK_P, TMA)
                b_dy = load_tile(dy, i_b, o_l, i_h, L, H, o_p, P, Q, BLOCK_P, TMA)
            if HALVES == 2:
                i_1 = i_state + ((1 - i_half) if BOTH else 0)
                S_1 = load_state(states, i_1, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
                g_1 = load_state(grad_states, i_1, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
                x_far = load_tile(x, i_b, o_far, i_h, L, H, o_p, P, Q, BLOCK_P, TMA)
                dy_far = load_tile(dy, i_b, o_far, i_h, L, H, o_p, P, Q, BLOCK_P, TMA)
                x_far = tl.trans((x_far * w_x[:, None]).to(x_far.dtype))
                dy_far = tl.trans((dy_far * w_dy[:, None]).to(dy_far.dtype))
                S_1 = tl.dot(x_far, B_far, S_1.to(tl.float32) * cross_x, input_precision=PRECISION).to(b_x.dtype)
                g_1 = tl.dot(dy_far, C_far, g_1.to(tl.float32) * cross_dy, input_precision=PRECISION).to(b_x.dtype)
                i_2 = i_state + i_half
                if BOTH:
                    S_2 = load_state(states, i_2, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
                    g_2 = load_state(grad_states, i_2, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
                    # S_left meets gF, S_right gB: moved and unmoved ones
                    met = S_2.to(tl.float32) * g_1.to(tl.float32) + S_1.to(tl.float32) * g_2.to(tl.float32)
                else:
                    met = S_1.to(tl.float32) * g_1.to(tl.float32)
            else:
                i_1 = i_state if FORWARD else i_state + 1
                i_g1 = i_state + (DIRECTIONS - 1 if FORWARD else 0)
                S_1 = load_state(states, i_1, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
                g_1 = load_state(grad_states, i_g1, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
                met = S_1.to(tl.float32) * g_1.to(tl.float32)
                if BOTH:
                    S_2 = load_state(states, i_state + 1, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
                    g_2 = load_state(grad_states, i_state, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
                    met += S_2.to(tl.float32) * g_2.to(tl.float32)
            crossed += tl.sum(tl.sum(met, 1), 0)
            acc_B += tl.dot(b_x, g_1, input_precision=PRECISION) * to_1[:, None]
            if BOTH:
                acc_B += tl.dot(b_x, g_2, input_precision=PRECISION) * to_2[:, None]
            t = tl.dot(b_dy, S_1, input_precision=PRECISION)
            read_1 += tl.sum(b_C.to(tl.float32) * t, 1)
            acc_C += t * from_1[:, None]
            if BOTH:
                t = tl.dot(b_dy, S_2, input_precision=PRECISION)
                read_2 += tl.sum(b_C.to(tl.float32) * t, 1)
                acc_C += t * from_2[:, None]
        read_1 *= from_1
        read_2 *= from_2
        p_line = lines + ((i_row * SETS + SET) * LINES + 4 + i_n) * PADDED + o_l + r
        p_cross = (
            crossing + ((i_b * CHUNKS * HALVES + i_c * HALVES + i_half).to(tl.int64) * H + i_h) * 2 * BLOCKS_N + i_n
        )
        if HALVES == 2 and BOTH:
            forward_line = tl.where(i_half == 0, read_2, read_1)
            backward_line = tl.where(i_half == 0, read_1, read_2)
        else:
            forward_line = read_1
            backward_line = read_2 if BOTH else read_1
        if FORWARD:
            tl.store(p_line, forward_line)
            tl.store(p_cross, crossed * cross)
        if BACKWARD:
            tl.store(p_line + BLOCKS_N * PADDED, backward_line)
            if not FORWARD:
                tl.store(p_cross + BLOCKS_N, crossed * cross)
    b_C = load_tile(C, i_b, o_C, i_g, L, G, o_n, N, Q, BLOCK_N, TMA)
    b_B = load_tile(B, i_b, o_l, i_g, L, G, o_n, N, Q, BLOCK_N, TMA)
    if BOTH:
        dM = tl.where(i == j, 2.0 * dM, dM)
    dM_16 = dM.to(b_B.dtype)
    acc_B = tl.dot(dM_16, b_C, acc_B, input_precision=PRECISION)
    acc_C = tl.dot(tl.trans(dM_16), b_B, acc_C, input_precision=PRECISION)
    store_tile(dB, acc_B, i_part * NB + i_b, o_l, i_g, L, G, o_n, N, Q, BLOCK_N, TMA)
    store_tile(dC, acc_C, i_part * NB + i_b, o_l, i_g, L, G, o_n, N, Q, BLOCK_N, TMA)


@triton.jit(do_not_specialize=["L", "CHUNKS", "NB", "HEADS"])
def grad_bc_kernel(
    x,
    dy,
    B,
    C,
    seq,
    states,
    grad_states,
    rows,
    dB,
    dC,
    lines,
    crossing,
    L,
    CHUNKS,
    NB,
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
    DIRECTIONS: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    SETS: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCKS_N: tl.constexpr = N2 // BLOCK_N
    K: tl.constexpr = Q * HALVES
    PARTS = H // G // HEADS
    pid = tl.program_id(0)
    i_half = pid % HALVES
    pid //= HALVES
    i_n = pid % BLOCKS_N
    o_n = i_n * BLOCK_N
    pid //= BLOCKS_N
    i_first = (pid % (H // HEADS)) * HEADS
    pid //= H // HEADS
    i_c = pid % CHUNKS
    i_b = pid // CHUNKS
    i_part = (i_first // HEADS) % PARTS
    i_g = i_first // (H // G)
    o_l = i_c * K + i_half * Q
    o_far = i_c * K + (1 - i_half) * Q
    if o_l >= L:
        return
    grad_bc_rows(
        i_b, i_c, i_half, i_n, i_g, i_part, i_first, 1, o_n, o_l, o_far, x, dy, B, C, seq, states, grad_states, rows,
        dB, dC, lines, crossing, L, CHUNKS, NB, H, G, P, N, Q, HALVES, HEADS, LINES, BLOCK_P, BLOCK_N, P2, N2,
        DIRECTIONS, FORWARD, BACKWARD, SETS, SHIFT, HAS_SEQ, STAGES, TMA, PRECISION,
    )  # fmt: skip


class GradBC(NamedTuple):
    """dB and dC `(b, l, g, n)`, those of the backward direction (untied only), and `crossing (b * row blocks, h, 2,
    blocks of n)`, which grad_dt reads."""

    dB: Tensor
    dC: Tensor
    dB_back: Tensor | None
    dC_back: Tensor | None
    crossing: Tensor


def grad_bc(
    problem: Problem,
    config: Config,
    x: Tensor,
    dy: Tensor,
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
    states: Tensor,
    grad_states: Tensor,
    rows: Tensor,
    lines: Tensor,
    *,
    seq_idx: Tensor | None,
) -> GradBC:
    """B, C: pairs (forward, backward). Writes lines 4.. of `lines`."""
    crossing = room_for_crossing(problem, config, x.device)
    common = (problem, config, x, dy, B, C, states, grad_states, rows, lines, crossing, seq_idx)
    sides = [one_side(*common, forward=True, backward=problem.bidirectional and not problem.two_matrices)]
    if problem.two_matrices:
        sides.append(one_side(*common, forward=False, backward=True))
    return GradBC(*sum_sides(problem, config, sides, B, C), crossing)


def one_side(
    problem: Problem,
    config: Config,
    x: Tensor,
    dy: Tensor,
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
    states: Tensor,
    grad_states: Tensor,
    rows: Tensor,
    lines: Tensor,
    crossing: Tensor,
    seq_idx: Tensor | None,
    *,
    forward: bool,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """A launch: dB and dC, or what `sum_sides` makes of them."""
    side = 0 if forward else 1
    dB, dC = room_for_sums(problem, config, B[side], C[side])
    _launch(problem, config, forward, backward, seq_idx is not None)(
        x=x,
        dy=dy,
        B=B[side],
        C=C[side],
        seq=seq_idx,
        states=states,
        grad_states=grad_states,
        rows=rows,
        dB=dB,
        dC=dC,
        lines=lines,
        crossing=crossing,
    )
    return dB, dC


def bc_parts(problem: Problem, config: Config) -> int:
    """Of the heads of a group, each by a program of its own."""
    return problem.h // problem.g // config.grad_bc_heads


def _whole(problem: Problem, config: Config) -> bool:
    """Whether a launch writes dB and dC themselves, and not parts that remain to be summed."""
    return bc_parts(problem, config) == 1 and not problem.shift and (problem.untied or not problem.two_matrices)


def room_for_crossing(problem: Problem, config: Config, device: torch.device) -> Tensor:
    shape = (problem.row_blocks(config), problem.h, 2, problem.n2 // config.grad_bc_block_n)
    return torch.empty(shape, dtype=torch.float32, device=device)


def room_for_sums(problem: Problem, config: Config, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """For dB and dC of a launch."""
    if _whole(problem, config):
        return torch.empty_like(B), torch.empty_like(C)
    shape = (bc_parts(problem, config) * problem.b, *B.shape[1:])
    dB, dC = (torch.empty(shape, dtype=torch.float32, device=B.device) for _ in range(2))
    return dB, dC


def sum_sides(
    problem: Problem,
    config: Config,
    sides: list[tuple[Tensor, Tensor]],
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dB, dC, and those of the backward direction, from what the launches wrote: one, or one a side."""
    (dB, dC), (dB_back, dC_back) = sides[0], sides[-1]
    if not problem.two_matrices:
        if not _whole(problem, config):
            dB, dC = reduce_parts([dB], B[0]), reduce_parts([dC], C[0])
        return dB, dC, None, None
    if _whole(problem, config):
        return dB, dC, dB_back, dC_back
    # A reader i used row i - 1 of C forward and row i + 1 backward: row l collects from readers l + 1 and l - 1
    step = 1 if problem.shift else 0
    if problem.untied:
        return (
            reduce_parts([dB], B[0]),
            reduce_parts([dC], C[0], [step]),
            reduce_parts([dB_back], B[1]),
            reduce_parts([dC_back], C[1], [-step]),
        )
    return reduce_parts([dB, dB_back], B[0]), reduce_parts([dC, dC_back], C[0], [step, -step]), None, None


@once_a_form
def _launch(problem: Problem, config: Config, forward: bool, backward: bool, seq: bool) -> Launch:
    b, q, width = problem.b, config.rows, config.grad_bc_block_n
    wide = tiles((b, problem.l, problem.h, problem.p), q, config.block_p)
    narrow = tiles((b, problem.l, problem.g, problem.n), q, width)
    sums = tiles((bc_parts(problem, config) * b, problem.l, problem.g, problem.n), q, width)
    states = line_tiles(problem.states_shape(config), config.block_p, width)
    descriptors = dict(x=wide, dy=wide, B=narrow, C=narrow, states=states, grad_states=states, dB=sums, dC=sums)
    return Launch(
        grad_bc_kernel,
        problem.row_blocks(config) * (problem.h // config.grad_bc_heads) * (problem.n2 // width),
        problem.device,
        descriptors if config.tma else {},
        **gradient_settings(problem, config, seq),
        NB=b,
        HEADS=config.grad_bc_heads,
        BLOCK_N=width,
        DIRECTIONS=problem.directions,
        FORWARD=forward,
        BACKWARD=backward,
        SETS=problem.sets,
        STAGES=config.grad_bc_stages,
    )
