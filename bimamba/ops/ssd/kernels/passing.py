"""Stage 1b: where batch times heads is too small for walks, chunks compute their own states at once, and this passes
them.

`S[c]`, the contribution of chunk c, becomes what enters chunk c: a scan over chunks, elementwise in (p, n), in place.
Latency bound: narrow programs with many loads in flight.
"""

import triton
import triton.language as tl
from torch import Tensor

from bimamba.ops.launch import Launch, once_a_form

from .choose import Config, Problem
from .common import ROW_LINES, sequence_ids


@triton.jit(do_not_specialize=["L", "CHUNKS"])
def passing_kernel(
    states,
    rows,
    seq,
    enter_left,
    enter_right,
    leave_left,
    leave_right,
    L,
    CHUNKS,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HALVES: tl.constexpr,
    SLOTS: tl.constexpr,
    P2: tl.constexpr,
    N2: tl.constexpr,
    BLOCK: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    GRAD: tl.constexpr,
    UNTIED: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    HAS_ENTER: tl.constexpr,
    HAS_LEAVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCKS: tl.constexpr = P2 * N2 // BLOCK
    SETS: tl.constexpr = 2 if UNTIED else 1
    K: tl.constexpr = Q * HALVES
    pid = tl.program_id(0)
    i_slot = pid % DIRECTIONS
    pid //= DIRECTIONS
    o_s = (pid % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    pid //= BLOCKS
    i_h = pid % H
    i_b = (pid // H).to(tl.int64)
    if DIRECTIONS == 2:
        back = i_slot
        own = 1 - i_slot if GRAD else i_slot
    else:
        back = i_slot * 0 + (1 if GRAD else 0)
        own = i_slot * 0
    p_row = rows + ((i_b * H + i_h) * SETS + (own if UNTIED else 0)) * ROW_LINES * CHUNKS * K
    i_state = ((i_b * CHUNKS * SLOTS + back * (SLOTS - 1)) * H + i_h) * DIRECTIONS + i_slot
    p_state = states + i_state * (P2 * N2) + o_s
    if HAS_SEQ:
        p_seq = seq + i_b * L
        id_last = tl.zeros((1,), tl.int32)
    o_pn = (i_b * H + i_h) * (P * N) + (o_s // N2) * N + o_s % N2
    m_pn = (o_s // N2 < P) & (o_s % N2 < N)
    carry = tl.zeros((BLOCK,), tl.float32)
    if HAS_ENTER:
        if back == 1:
            carry = tl.load(enter_right + o_pn, mask=m_pn, other=0.0)
        else:
            carry = tl.load(enter_left + o_pn, mask=m_pn, other=0.0)
    for i in tl.range(0, CHUNKS, num_stages=STAGES):
        i_c = i + back * (CHUNKS - 1 - 2 * i)
        p_c = p_state + i_c.to(tl.int64) * (SLOTS * H * DIRECTIONS * P2 * N2)
        own_state = tl.load(p_c).to(tl.float32)
        # As vectors of one: the pipeliner leaves scalars where they stand, and their latency is all that counts here
        total = tl.load(p_row + i_c * K + K - 1 + tl.arange(0, 1))
        if HALVES == 2:
            total += tl.load(p_row + i_c * K + Q - 1 + tl.arange(0, 1))
        cross = tl.exp2(total)
        if HAS_SEQ:
            # A state crosses a chunk of one sequence alone, and enters none that begins with another
            id_left = sequence_ids(p_seq, i_c * K, L, 1)
            id_right = sequence_ids(p_seq, i_c * K + K - 1, L, 1)
            cross = tl.where(id_left == id_right, cross, 0.0)
            id_enter = tl.where(back == 1, id_right, id_left)
            carry = tl.where((i > 0) & (id_last != id_enter), 0.0, carry)
            id_last = tl.where(back == 1, id_left, id_right)
        tl.store(p_c, carry.to(states.dtype.element_ty))
        carry = carry * cross + own_state
    if HAS_LEAVE:
        if back == 1:
            tl.store(leave_left + o_pn, carry, mask=m_pn)
        else:
            tl.store(leave_right + o_pn, carry, mask=m_pn)


def pass_states(
    problem: Problem,
    config: Config,
    states: Tensor,
    rows: Tensor,
    *,
    seq_idx: Tensor | None,
    enter: tuple,
    leave: tuple,
    grad: bool,
) -> None:
    """Turns the chunks' own states into the states that enter them, in place; arguments as of `chunk_states`."""
    _launch(problem, config, grad, seq_idx is not None, enter[0] is not None, leave[0] is not None)(
        states=states,
        rows=rows,
        seq=seq_idx,
        enter_left=enter[0],
        enter_right=enter[1],
        leave_left=leave[0],
        leave_right=leave[1],
    )


@once_a_form
def _launch(problem: Problem, config: Config, grad: bool, seq: bool, enter: bool, leave: bool) -> Launch:
    block = min(config.passing_block, problem.p2 * problem.n2)
    blocks = problem.p2 * problem.n2 // block
    fill = 1 if grad else config.fill  # only every so many states are there
    return Launch(
        passing_kernel,
        problem.b * problem.h * problem.directions * blocks,
        problem.device,
        L=problem.l,
        CHUNKS=problem.chunks(config) // fill,
        H=problem.h,
        P=problem.p,
        N=problem.n,
        Q=config.rows,
        HALVES=config.halves * fill,
        SLOTS=fill,
        P2=problem.p2,
        N2=problem.n2,
        BLOCK=block,
        DIRECTIONS=problem.directions,
        GRAD=grad,
        UNTIED=problem.untied,
        HAS_SEQ=seq,
        HAS_ENTER=enter,
        HAS_LEAVE=leave,
        STAGES=config.passing_stages,
        num_warps=config.passing_warps,
    )
