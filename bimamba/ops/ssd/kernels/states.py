"""Stage 1: the state that enters each chunk, in each direction; in the backward pass the gradients of those states.

    rightward  S <- exp(total) S + sum_j exp(total - s_j) delta_j x_j B_j^T
    leftward   S <- exp(total) S + sum_j exp(e_j) delta_j x_j B_j^T

Gradients (GRAD) are states of (dy, C) passed the opposite way: that of the rightward state comes from the right, with
the weights exp(f_i), that of the leftward state from the left, with exp(total - b_i).

One program owns (batch row, head, direction[, block of p and n]). It either walks over all chunks with the state in
registers (WALK) and writes what enters each of them, or it writes one chunk's own contribution, which `passing.py`
then passes. The forward pass also writes `rows`, which every later stage reads.
"""

# ruff: noqa: SIM102 - branches on constexpr flags compile one side only; ternaries and `and` would not

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba.ops.launch import Launch, once_a_form, row_stride

from .choose import Config, Problem
from .common import LOG2E, ROW_LINES, load_tile, sequence_id, sequence_ids, step_size, store_state
from .descriptors import line_tiles, tiles
from .passing import pass_states


@triton.jit(do_not_specialize=["L", "CHUNKS"])
def states_kernel(
    x,
    B,
    B_back,
    dt,
    dt_back,
    A,
    A_back,
    bias,
    bias_back,
    mask,
    seq,
    enter_left,
    enter_right,
    leave_left,
    leave_right,
    states,
    rows,
    least,
    largest,
    L,
    CHUNKS,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HALVES: tl.constexpr,
    STRIDE_DT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    P2: tl.constexpr,
    N2: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    GRAD: tl.constexpr,
    WALK: tl.constexpr,
    UNTIED: tl.constexpr,
    SHIFT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LIMITED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    HAS_ENTER: tl.constexpr,
    HAS_LEAVE: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCKS_P: tl.constexpr = P2 // BLOCK_P
    BLOCKS_N: tl.constexpr = N2 // BLOCK_N
    SETS: tl.constexpr = 2 if UNTIED else 1
    K: tl.constexpr = Q * HALVES
    pid = tl.program_id(0)
    i_slot = pid % DIRECTIONS
    pid //= DIRECTIONS
    o_n = (pid % BLOCKS_N) * BLOCK_N
    pid //= BLOCKS_N
    o_p = (pid % BLOCKS_P) * BLOCK_P
    pid //= BLOCKS_P
    i_h = pid % H
    pid //= H
    # `back`: this program walks from right to left. `own`: whose parameters it reads, 0 forward, 1 backward.
    if DIRECTIONS == 2:
        back = i_slot
        own = 1 - i_slot if GRAD else i_slot
    else:
        back = i_slot * 0 + (1 if GRAD else 0)
        own = i_slot * 0
    if WALK:
        i_b = pid
        first = back * (CHUNKS - 1)
        steps = CHUNKS
    else:
        i_b = pid // CHUNKS
        first = pid % CHUNKS
        steps = 1
    if UNTIED:
        if own == 1:
            B = B_back
        if not GRAD:
            if own == 1:
                dt = dt_back
                A = A_back
            if HAS_BIAS:  # not joined: the branch below exists only where there is a bias
                if own == 1:
                    bias = bias_back
    i_g = i_h // (H // G)
    o_k = tl.arange(0, K)
    p_row = rows + ((i_b.to(tl.int64) * H + i_h) * SETS + (own if UNTIED else 0)) * ROW_LINES * CHUNKS * K
    if HAS_SEQ:
        p_seq = seq + i_b.to(tl.int64) * L
        ahead_ids = sequence_ids(p_seq, first * K, L, K)
        ahead_enter = sequence_id(p_seq, first * K + back * (K - 1), L)
        ahead_leave = sequence_id(p_seq, first * K + (1 - back) * (K - 1), L)
    if GRAD:
        # A reader's weight takes s or e, and only one of them
        p_weight = p_row + ((1 - own) if SHIFT else own) * CHUNKS * K
        ahead = tl.load(p_weight + first * K + o_k)
        if HALVES == 2:
            ahead_first = tl.load(p_row + first * K + Q - 1)
        ahead_total = tl.load(p_row + first * K + K - 1)
    else:
        decay = tl.load(A + i_h).to(tl.float32) * LOG2E
        offset = tl.load(bias + i_h).to(tl.float32) if HAS_BIAS else 0.0
        p_dt = dt + i_b.to(tl.int64) * L * STRIDE_DT + i_h
        ahead = tl.load(p_dt + (first * K + o_k).to(tl.int64) * STRIDE_DT, mask=first * K + o_k < L, other=0.0)
        if HAS_MASK:
            p_mask = mask + i_b.to(tl.int64) * L
            ahead_mask = tl.load(p_mask + first * K + o_k, mask=first * K + o_k < L, other=0)
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    o_pn = (o_p + tl.arange(0, BLOCK_P))[:, None] * N + (o_n + tl.arange(0, BLOCK_N))[None, :]
    m_pn = ((o_p + tl.arange(0, BLOCK_P)) < P)[:, None] & ((o_n + tl.arange(0, BLOCK_N)) < N)[None, :]
    o_pn += (i_b.to(tl.int64) * H + i_h) * (P * N)
    if WALK and HAS_ENTER:
        if back == 1:
            acc = tl.load(enter_right + o_pn, mask=m_pn, other=0.0)
        else:
            acc = tl.load(enter_left + o_pn, mask=m_pn, other=0.0)
    for i in tl.range(0, steps, num_stages=STAGES):
        i_c = first + i - 2 * i * back
        o_l = i_c * K
        i_state = (((i_b * CHUNKS + i_c) * SLOTS + back * (SLOTS - 1)) * H + i_h) * DIRECTIONS + i_slot
        b_x = load_tile(x, i_b, o_l, i_h, L, H, o_p, P, K, BLOCK_P, TMA)
        if SHIFT and GRAD:
            b_B = load_tile(B, i_b, o_l - 1 + 2 * own, i_g, L, G, o_n, N, K, BLOCK_N, TMA)
        else:
            b_B = load_tile(B, i_b, o_l, i_g, L, G, o_n, N, K, BLOCK_N, TMA)
        # The next chunk's small loads go out now: they feed no product, so the pipeliner leaves them where they stand
        v = ahead
        i_next = i_c + 1 - 2 * back
        o_ahead = tl.minimum(tl.maximum(i_next, 0), CHUNKS - 1) * K  # after the last step: not used
        if GRAD:
            total = ahead_total
            if HALVES == 2:  # rows count from the middle again
                v = tl.where(o_k < Q, v, v + ahead_first)
                total += ahead_first
            ahead = tl.load(p_weight + o_ahead + o_k)
            if HALVES == 2:
                ahead_first = tl.load(p_row + o_ahead + Q - 1)
            ahead_total = tl.load(p_row + o_ahead + K - 1)
            w = tl.exp2(tl.where(own == 0, v, total - v))
        else:
            o_next = i_next * K + o_k
            ahead = tl.load(p_dt + o_next.to(tl.int64) * STRIDE_DT, mask=(o_next >= 0) & (o_next < L), other=0.0)
            delta = step_size(v.to(tl.float32) + offset, least, largest, SOFTPLUS, LIMITED)
            delta = tl.where(o_l + o_k < L, delta, 0.0)
            if HAS_MASK:
                delta = tl.where(ahead_mask != 0, delta, 0.0)
                ahead_mask = tl.load(p_mask + o_next, mask=(o_next >= 0) & (o_next < L), other=0)
            a = delta * decay
            s = tl.cumsum(a, 0)
            total = tl.min(s, 0)  # the last one
            if (o_p == 0) & (o_n == 0) & ((own == 0) | UNTIED):
                s_rows = s
                if HALVES == 2:
                    s_rows = tl.where(o_k < Q, s, s - tl.sum(tl.where(o_k < Q, a, 0.0), 0))
                tl.store(p_row + o_l + o_k, s_rows)
                tl.store(p_row + CHUNKS * K + o_l + o_k, s_rows - a)
                tl.store(p_row + 2 * CHUNKS * K + o_l + o_k, delta)
            # Not as `total - s`: these are large for strong decays, and the last rows would lose what float32 holds
            to_right = (tl.cumsum(a, 0, reverse=True) - a) if EXACT else (total - s)
            w = tl.exp2(tl.where(own == 0, to_right, s - a)) * delta
        cross = tl.exp2(total)
        if HAS_SEQ:
            # Only rows of the sequence at the edge that the state leaves by reach that edge
            ids = ahead_ids
            id_enter = ahead_enter
            id_leave = ahead_leave
            ahead_ids = sequence_ids(p_seq, o_ahead, L, K)
            ahead_enter = sequence_id(p_seq, o_ahead + back * (K - 1), L)
            ahead_leave = sequence_id(p_seq, o_ahead + (1 - back) * (K - 1), L)
            w = tl.where(ids == id_leave, w, 0.0)
            if WALK:
                cross = tl.where(id_enter == id_leave, cross, 0.0)
        if WALK:
            store_state(states, acc, i_state, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
        acc = acc * cross
        acc = tl.dot(tl.trans(b_x), (b_B * w[:, None]).to(b_B.dtype), acc, input_precision=PRECISION)
        if WALK and HAS_SEQ:  # the next chunk begins with another sequence; behind the last one nothing does
            acc = tl.where((i + 1 < steps) & (ahead_enter != id_leave), 0.0, acc)
        if not WALK:
            store_state(states, acc, i_state, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
    if WALK and HAS_LEAVE:
        if back == 1:
            tl.store(leave_left + o_pn, acc, mask=m_pn)
        else:
            tl.store(leave_right + o_pn, acc, mask=m_pn)


def chunk_states(
    problem: Problem,
    config: Config,
    x: Tensor,
    B: Tensor,
    B_back: Tensor,
    rows: Tensor,
    *,
    dt: tuple = (None, None),
    A: tuple = (None, None),
    bias: tuple = (None, None),
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    enter: tuple = (None, None),
    leave: tuple = (None, None),
    grad: bool = False,
) -> Tensor:
    """States entering every chunk, `(b, chunks, h, directions, P2, N2)` in x's dtype: where `config.fill` is 2, and not
    for gradients, those that enter every pair of chunks; the output stage fills in the others.

    With `grad`, `x` is dy and `B` is C. Writes `rows` unless `grad`. `enter` and `leave` are (at the left edge, at the
    right edge): states fp32 `(b, h, p, n)` to start from, and tensors that receive what arrives in the end.
    """
    states = torch.empty(problem.states_shape(config), dtype=x.dtype, device=x.device)
    flags = (bias[0] is not None, mask is not None, seq_idx is not None, enter[0] is not None, leave[0] is not None)
    _launch(problem, config, grad, 0 if grad else row_stride(dt[0]), *flags)(
        x=x,
        B=B,
        B_back=B_back,
        dt=dt[0],
        dt_back=dt[1],
        A=A[0],
        A_back=A[1],
        bias=bias[0],
        bias_back=bias[1],
        mask=mask,
        seq=seq_idx,
        enter_left=enter[0],
        enter_right=enter[1],
        leave_left=leave[0],
        leave_right=leave[1],
        states=states,
        rows=rows,
    )
    if not config.walk:
        pass_states(problem, config, states, rows, seq_idx=seq_idx, enter=enter, leave=leave, grad=grad)
    return states


@once_a_form
def _launch(
    problem: Problem,
    config: Config,
    grad: bool,
    stride_dt: int,
    bias: bool,
    mask: bool,
    seq: bool,
    enter: bool,
    leave: bool,
) -> Launch:
    """The flags: whether these are there."""
    blocks = (problem.p2 // config.block_p) * (problem.n2 // config.states_block_n)
    fill = 1 if grad else config.fill
    chunk, chunks, width = config.chunk * fill, problem.chunks(config) // fill, config.states_block_n
    tma = config.tma and not problem.untied  # a descriptor cannot be chosen by direction outside the loop
    descriptors = dict(
        x=tiles((problem.b, problem.l, problem.h, problem.p), chunk, config.block_p),
        B=tiles((problem.b, problem.l, problem.g, problem.n), chunk, width),
        states=line_tiles(problem.states_shape(config), config.block_p, width),
    )
    return Launch(
        states_kernel,
        problem.b * problem.h * problem.directions * blocks * (1 if config.walk else chunks),
        problem.device,
        descriptors if tma else {},
        **problem.sizes,
        least=float(problem.dt_limit[0]),
        largest=float(problem.dt_limit[1]),
        CHUNKS=chunks,
        Q=config.rows,
        HALVES=config.halves * fill,
        STRIDE_DT=stride_dt,
        SLOTS=fill,
        BLOCK_P=config.block_p,
        BLOCK_N=width,
        DIRECTIONS=problem.directions,
        GRAD=grad,
        WALK=config.walk,
        UNTIED=problem.untied,
        SOFTPLUS=problem.dt_softplus,
        HAS_BIAS=bias,
        LIMITED=problem.limited,
        HAS_MASK=mask,
        HAS_SEQ=seq,
        HAS_ENTER=enter,
        HAS_LEAVE=leave,
        STAGES=config.states_stages,
        TMA=tma,
        EXACT=problem.dtype == torch.float32,
        num_warps=config.states_warps,
    )
