"""Stage 2: y, from the states that enter each chunk and the pairs (reader i, source j) inside it.

    y_i = exp(f_i) C_i S_left + exp(total - b_i) C_i S_right + sum_j (decay o C B^T)_ij delta_j x_j + D x_i,  then *
    SiLU(z_i)

One program owns (batch row, some heads of a group, rows of a chunk[, block of p]); while it works on one head the next
one's tiles arrive. With `HALVES == 2` its rows are half of a chunk; one
of the two entering states must then first be moved over the other half, which is one small product, and stage 1 writes
half as many states. Where the backward pass wants a state for every block of rows (FILL), the moved ones are kept.
"""

# ruff: noqa: SIM102, SIM108 - branches on constexpr flags compile one side only; ternaries and `and` would not

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba.ops.launch import Launch, once_a_form

from .choose import Config, Problem
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
    store_state,
    store_tile,
    within_sequences,
)
from .descriptors import line_tiles, tiles


@triton.jit(do_not_specialize=["L", "CHUNKS", "NB", "HEADS"])
def output_kernel(
    x,
    B,
    C,
    B_back,
    C_back,
    D,
    z,
    seq,
    states,
    rows,
    y,
    ungated,
    L,
    CHUNKS,
    NB,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS,
    Q: tl.constexpr,
    HALVES: tl.constexpr,
    FILL: tl.constexpr,
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
    GATED: tl.constexpr,
    KEEP_UNGATED: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCKS_P: tl.constexpr = P2 // BLOCK_P
    BLOCKS_N: tl.constexpr = N2 // BLOCK_N
    DIRECTIONS: tl.constexpr = 2 if BIDIRECTIONAL else 1
    SETS: tl.constexpr = 2 if UNTIED else 1
    TWO_MATRICES: tl.constexpr = BIDIRECTIONAL and (UNTIED or SHIFT)
    TIED: tl.constexpr = BIDIRECTIONAL and not TWO_MATRICES
    K: tl.constexpr = Q * HALVES
    SLOTS: tl.constexpr = HALVES if FILL else 1
    HOIST: tl.constexpr = BLOCKS_N == 1  # B and C stay for all heads
    pid = tl.program_id(0)
    i_half = pid % HALVES
    pid //= HALVES
    o_p = (pid % BLOCKS_P) * BLOCK_P
    pid //= BLOCKS_P
    i_first = (pid % (H // HEADS)) * HEADS
    pid //= H // HEADS
    i_b = pid % NB
    i_c = pid // NB
    # What a walk touched last is still in the cache: with two directions the chunks at both edges, in turn (H100: n 128
    # 231 -> 227 us, causal 117 -> 115; the gradients' stages gained nothing by it)
    if BIDIRECTIONAL:
        i_c = i_c // 2 + (i_c % 2) * (CHUNKS - 1 - 2 * (i_c // 2))
    else:
        i_c = CHUNKS - 1 - i_c
    o_l = i_c * K + i_half * Q
    o_far = i_c * K + (1 - i_half) * Q
    if o_l >= L:
        return
    i_g = i_first // (H // G)
    r = tl.arange(0, Q)
    i = r[:, None]
    j = r[None, :]
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
            Bf_0 = load_tile(B, i_b, o_far, i_g, L, G, 0, N, Q, BLOCK_N, TMA)
    if TIED:
        # C_i B_i: the diagonal counts once more than `both_ways` says
        twice = tl.zeros((Q,), tl.float32)
        for k in range(BLOCKS_N):
            b_B = B_0 if HOIST else load_tile(B, i_b, o_l, i_g, L, G, k * BLOCK_N, N, Q, BLOCK_N, TMA)
            b_C = C_0 if HOIST else load_tile(C, i_b, o_l, i_g, L, G, k * BLOCK_N, N, Q, BLOCK_N, TMA)
            twice += tl.sum(b_B.to(tl.float32) * b_C.to(tl.float32), 1)
    PADDED = CHUNKS * K
    # The sums of the next head are loaded while this one is worked on: they feed no product, so the pipeliner leaves
    # them where they stand, and their latency would show (H100, chunk 128: 88 -> 83 us; by descriptors 85)
    p_total = rows + (i_b.to(tl.int64) * H + i_first) * (SETS * ROW_LINES * PADDED) + Q - 1
    total_next = tl.load(p_total + o_l)
    if HALVES == 2:
        total_far_next = tl.load(p_total + o_far)
    if HAS_D and not D_CHANNELS:
        D_next = tl.load(D + i_first)
    i_line = (i_b * H + i_first) * (SETS * ROW_LINES)
    s_next, e_next, d_next = load_rows(rows, i_line, o_l, PADDED, Q, False)
    if HALVES == 2:
        sf_next, ef_next, df_next = load_rows(rows, i_line, o_far, PADDED, Q, False)
    for i_head in tl.range(0, HEADS, num_stages=STAGES, disable_licm=True):
        i_h = i_first + i_head
        i_state = ((i_b * CHUNKS + i_c) * SLOTS * H + i_h) * DIRECTIONS
        i_line = (i_b * H + i_h) * (SETS * ROW_LINES)
        total = total_next
        if UNTIED:
            total_back = tl.load(p_total + ROW_LINES * PADDED + o_l)
        if HALVES == 2:
            total_far = total_far_next
        p_total += tl.where(i_head + 1 < HEADS, SETS * ROW_LINES * PADDED, 0)
        total_next = tl.load(p_total + o_l)
        if HALVES == 2:
            total_far_next = tl.load(p_total + o_far)
        if HAS_D and not D_CHANNELS:
            D_head = D_next
            D_next = tl.load(D + tl.minimum(i_h + 1, H - 1))
        s = s_next
        e = e_next
        delta = d_next
        i_line_next = (i_b * H + tl.minimum(i_h + 1, H - 1)) * (SETS * ROW_LINES)
        s_next, e_next, d_next = load_rows(rows, i_line_next, o_l, PADDED, Q, False)
        if HALVES == 2:
            s_far = sf_next
            e_far = ef_next
            delta_far = df_next
            sf_next, ef_next, df_next = load_rows(rows, i_line_next, o_far, PADDED, Q, False)
        f, b = reading(s, e, SHIFT)
        if UNTIED:
            s_back, e_back, delta_back = load_rows(rows, i_line + ROW_LINES, o_l, PADDED, Q, False)
            _, b = reading(s_back, e_back, SHIFT)
        else:
            e_back = e
            total_back = total
            delta_back = delta
        w_left = tl.exp2(f)
        w_right = tl.exp2(total_back - b)
        if HAS_SEQ:
            w_left = of_sequence(w_left, p_seq, o_l, o_l, L, mixed, Q)
            w_right = of_sequence(w_right, p_seq, o_l, o_l + Q - 1, L, mixed, Q)
        b_x = load_tile(x, i_b, o_l, i_h, L, H, o_p, P, Q, BLOCK_P, TMA)
        if HALVES == 2:
            # The first half moves the right state leftward over the second, the second the left one rightward over
            # the first
            w_far = tl.exp2(tl.where(i_half == 0, e_far, total_far - s_far)) * delta_far
            cross = tl.exp2(total_far)
            if HAS_SEQ:
                w_far = of_sequence(w_far, p_seq, o_far, o_near, L, mixed, Q)
                cross = tl.where(m_cross, cross, 0.0)
            if not BIDIRECTIONAL:
                w_far = tl.where(i_half == 0, 0.0, w_far)
                cross = tl.where(i_half == 0, 1.0, cross)
            x_far = load_tile(x, i_b, o_far, i_h, L, H, o_p, P, Q, BLOCK_P, TMA)
            x_far = tl.trans((x_far * w_far[:, None]).to(x_far.dtype))
            # Stored states of a chunk: one a direction, or one for each half, of which every other is there
            i_1 = i_state + ((1 - i_half) * ((SLOTS - 1) * H * DIRECTIONS + 1) if BIDIRECTIONAL else 0)
            i_2 = i_state + i_half * ((SLOTS - 1) * H * DIRECTIONS + 1)
            i_filled = i_state + (i_half * (H * DIRECTIONS - 1) + 1 if BIDIRECTIONAL else i_half * H)
        else:
            i_1 = i_state
            i_2 = i_state + 1

        # What the entering states give: 1 is moved over the other half (the left one if there are no halves), 2 is not
        read_1 = tl.zeros((Q, BLOCK_P), tl.float32)
        read_2 = tl.zeros((Q, BLOCK_P), tl.float32)
        for k in range(BLOCKS_N):
            o_n = k * BLOCK_N
            S_1 = load_state(states, i_1, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
            if HALVES == 2:
                if HOIST:
                    B_far = Bf_0
                else:
                    B_far = load_tile(B, i_b, o_far, i_g, L, G, o_n, N, Q, BLOCK_N, TMA)
                S_1 = tl.dot(x_far, B_far, S_1.to(tl.float32) * cross, input_precision=PRECISION).to(b_x.dtype)
                if FILL:
                    if BIDIRECTIONAL or i_half == 1:
                        store_state(states, S_1, i_filled, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
            if HOIST:
                b_C = C_0
                b_Cb = Cb_0 if TWO_MATRICES else C_0
            else:
                b_C = load_tile(C, i_b, (o_l - 1) if SHIFT else o_l, i_g, L, G, o_n, N, Q, BLOCK_N, TMA)
                b_Cb = b_C
                if TWO_MATRICES:
                    b_Cb = load_tile(C_back, i_b, (o_l + 1) if SHIFT else o_l, i_g, L, G, o_n, N, Q, BLOCK_N, TMA)
            read_1 = tl.dot(b_C, tl.trans(S_1), read_1, input_precision=PRECISION)
            if BIDIRECTIONAL:
                S_2 = load_state(states, i_2, o_p, o_n, P2, N2, BLOCK_P, BLOCK_N, TMA)
                read_2 = tl.dot(b_Cb, tl.trans(S_2), read_2, input_precision=PRECISION)
        if BIDIRECTIONAL and HALVES == 2:
            acc = read_1 * tl.where(i_half == 0, w_right, w_left)[:, None]
            acc += read_2 * tl.where(i_half == 0, w_left, w_right)[:, None]
        else:
            acc = read_1 * w_left[:, None]
            if BIDIRECTIONAL:
                acc += read_2 * w_right[:, None]

        # What the pairs give. C B^T once more for every head: cheaper than the registers that would keep it
        pairs = tl.zeros((Q, Q), tl.float32)
        pairs_back = tl.zeros((Q, Q), tl.float32)
        for k in range(BLOCKS_N):
            if HOIST:
                b_C = C_0
                b_B = B_0
            else:
                b_C = load_tile(C, i_b, (o_l - 1) if SHIFT else o_l, i_g, L, G, k * BLOCK_N, N, Q, BLOCK_N, TMA)
                b_B = load_tile(B, i_b, o_l, i_g, L, G, k * BLOCK_N, N, Q, BLOCK_N, TMA)
            pairs = tl.dot(b_C, tl.trans(b_B), pairs, input_precision=PRECISION)
            if TWO_MATRICES:
                if HOIST:
                    b_C = Cb_0
                    b_B = Bb_0
                else:
                    o_C = (o_l + 1) if SHIFT else o_l
                    b_C = load_tile(C_back, i_b, o_C, i_g, L, G, k * BLOCK_N, N, Q, BLOCK_N, TMA)
                    b_B = load_tile(B_back, i_b, o_l, i_g, L, G, k * BLOCK_N, N, Q, BLOCK_N, TMA)
                pairs_back = tl.dot(b_C, tl.trans(b_B), pairs_back, input_precision=PRECISION)
        if TWO_MATRICES:
            pairs = pairs * rightward(i, j, f[:, None], s[None, :], SHIFT) * delta[None, :]
            pairs += pairs_back * leftward(i, j, b[:, None], e_back[None, :], SHIFT) * delta_back[None, :]
        elif BIDIRECTIONAL:
            pairs = pairs * (both_ways(f[:, None], b[:, None], s[None, :], e[None, :]) * delta[None, :])
        else:
            pairs = pairs * rightward(i, j, f[:, None], s[None, :], SHIFT) * delta[None, :]
        if HAS_SEQ:
            pairs = within_sequences(pairs, p_seq, o_l, L, mixed, Q)
        acc = tl.dot(pairs.to(b_x.dtype), b_x, acc, input_precision=PRECISION)

        skip = (twice * delta)[:, None] if TIED else 0.0
        if HAS_D:
            if D_CHANNELS:
                o_c = o_p + tl.arange(0, BLOCK_P)
                skip += tl.load(D + i_h * P + o_c, mask=o_c < P, other=0.0)[None, :]
            else:
                skip += D_head
        if HAS_D or TIED:
            acc += b_x.to(tl.float32) * skip
        if GATED:
            if KEEP_UNGATED:
                store_tile(ungated, acc, i_b, o_l, i_h, L, H, o_p, P, Q, BLOCK_P, TMA)
            gate = load_tile(z, i_b, o_l, i_h, L, H, o_p, P, Q, BLOCK_P, TMA).to(tl.float32)
            acc = acc * gate / (1.0 + tl.exp(-gate))
        store_tile(y, acc, i_b, o_l, i_h, L, H, o_p, P, Q, BLOCK_P, TMA)


def scan_output(
    problem: Problem,
    config: Config,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    B_back: Tensor,
    C_back: Tensor,
    states: Tensor,
    rows: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    seq_idx: Tensor | None,
    keep_ungated: bool,
) -> tuple[Tensor, Tensor | None]:
    """`y (b, l, h, p)`, and if it is gated and `keep_ungated` the output before the gate, which the gradient of z
    needs."""
    y = torch.empty_like(x)
    ungated = torch.empty_like(x) if keep_ungated and z is not None else None
    two = problem.two_matrices
    _launch(problem, config, 0 if D is None else D.dim(), z is not None, ungated is not None, seq_idx is not None)(
        x=x,
        B=B,
        C=C,
        B_back=B_back if two else None,
        C_back=C_back if two else None,
        D=D,
        z=z,
        seq=seq_idx,
        states=states,
        rows=rows,
        y=y,
        ungated=ungated,
    )
    return y, ungated


@once_a_form
def _launch(problem: Problem, config: Config, dims_D: int, gated: bool, keep_ungated: bool, seq: bool) -> Launch:
    """`dims_D`: 0 where there is no D. The flags: whether these are there."""
    q, halves = config.rows, config.halves * config.fill
    chunks = problem.chunks(config) // config.fill
    wide = tiles((problem.b, problem.l, problem.h, problem.p), q, config.block_p)
    narrow = tiles((problem.b, problem.l, problem.g, problem.n), q, config.block_n)
    states = line_tiles(problem.states_shape(config), config.block_p, config.block_n)
    descriptors = dict(x=wide, z=wide, y=wide, ungated=wide, states=states)
    descriptors |= dict(B=narrow, C=narrow, B_back=narrow, C_back=narrow)
    return Launch(
        output_kernel,
        problem.b * chunks * (problem.h // config.output_heads) * (problem.p2 // config.block_p) * halves,
        problem.device,
        descriptors if config.tma else {},
        **problem.sizes,
        CHUNKS=chunks,
        NB=problem.b,
        HEADS=config.output_heads,
        Q=q,
        HALVES=halves,
        FILL=config.fill == 2,
        BLOCK_P=config.block_p,
        BLOCK_N=config.block_n,
        BIDIRECTIONAL=problem.bidirectional,
        UNTIED=problem.untied,
        HAS_SEQ=seq,
        HAS_D=dims_D > 0,
        D_CHANNELS=dims_D == 2,
        GATED=gated,
        KEEP_UNGATED=keep_ungated,
        STAGES=config.output_stages,
        TMA=config.tma,
        num_warps=config.output_warps,
    )
