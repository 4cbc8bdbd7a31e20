"""Stages 3 and 4 in one launch: programs of `grad_x.py` and of `grad_bc.py` side by side, over the same rows.

Both read x, dy and the gradients of the states, and either waits most of the time. A multiprocessor holds two programs:
here one of each kind, at the same pace over the heads of the same rows, so that one finds in the cache what the other
fetched and computes while it waits. H100, b8 l2048 h24 p64 n64: 211 us; one after the other 246.

So the programs come in groups of units (rows of a chunk): the first part of grad_x for all units of a group, then the
first part of grad_bc, the second of grad_x, and so on; a group of as many units as there are multiprocessors puts both
kinds on each. A part does not take a run of heads but every `parts`th one: at a time all are at about the same head,
whatever their number.

Heads are constexpr here: with a stride known at run time alone the tiles' coordinates are not uniform to the compiler,
and cost registers (500 instead of 454 us for the whole step).
"""

import triton
import triton.language as tl
from torch import Tensor

from bimamba.ops.launch import Launch, once_a_form

from .choose import Config, Problem, gradient_settings
from .descriptors import line_tiles, tiles
from .grad_bc import GradBC, bc_parts, grad_bc_rows, one_side, room_for_crossing, room_for_sums, sum_sides
from .grad_x import GradX, grad_x_rows, has_row_tma, room_for_x, x_settings


@triton.jit(do_not_specialize=["L", "CHUNKS", "NB", "GROUP"])
def gradients_kernel(
    x,
    dy,
    B,
    C,
    B_x,
    C_x,
    B_back,
    C_back,
    D,
    seq,
    states,
    grad_states,
    grad_states_x,
    rows,
    rows_x,
    dB,
    dC,
    dx,
    lines,
    crossing,
    dD,
    L,
    CHUNKS,
    NB,
    GROUP,
    HEADS_BC: tl.constexpr,
    HEADS_X: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HALVES: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N_BC: tl.constexpr,
    BLOCK_N_X: tl.constexpr,
    P2: tl.constexpr,
    N2: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr,
    UNTIED: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    HAS_D: tl.constexpr,
    D_CHANNELS: tl.constexpr,
    STAGES_BC: tl.constexpr,
    STAGES_X: tl.constexpr,
    TMA: tl.constexpr,
    ROW_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DIRECTIONS: tl.constexpr = 2 if BIDIRECTIONAL else 1
    SETS: tl.constexpr = 2 if UNTIED else 1
    BACKWARD: tl.constexpr = BIDIRECTIONAL and not (UNTIED or SHIFT)
    K: tl.constexpr = Q * HALVES
    BLOCKS_N: tl.constexpr = N2 // BLOCK_N_BC
    STEP_BC: tl.constexpr = H // G // HEADS_BC  # parts of a group's heads
    STEP_X: tl.constexpr = H // G // HEADS_X
    PARTS_BC: tl.constexpr = G * STEP_BC * BLOCKS_N
    PARTS_X: tl.constexpr = G * STEP_X
    PARTS: tl.constexpr = PARTS_BC + PARTS_X
    IN_TURN: tl.constexpr = 2 * (PARTS_BC if PARTS_BC < PARTS_X else PARTS_X)
    pid = tl.program_id(0)
    first = pid // (GROUP * PARTS) * GROUP
    size = tl.minimum(GROUP, NB * CHUNKS * HALVES - first)
    pid -= first * PARTS
    unit = first + pid % size
    turn = pid // size
    is_x = (turn < IN_TURN) & (turn % 2 == 0)
    if PARTS_X > PARTS_BC:
        is_x = is_x | (turn >= IN_TURN)
    i_part = tl.where(turn < IN_TURN, turn // 2, turn - IN_TURN // 2)
    i_half = unit % HALVES
    i_c = unit // HALVES % CHUNKS
    i_b = unit // HALVES // CHUNKS
    if (i_c * HALVES + i_half) * Q >= L:
        return
    if is_x:
        i_g = i_part // STEP_X
        i_first = i_g * (H // G) + i_part % STEP_X
        o_l = i_c * K + i_half * Q
        o_far = i_c * K + (1 - i_half) * Q
        grad_x_rows(
            i_b, i_c, i_half, i_g, i_first, STEP_X, o_l, o_far, x, dy, B if B_x is None else B_x,
            C if C_x is None else C_x, B_back, C_back, D, seq, grad_states if grad_states_x is None else grad_states_x,
            rows if rows_x is None else rows_x, rows, dx, lines, dD, L, CHUNKS, H, G, P, N, Q, HALVES, HEADS_X, LINES,
            BLOCK_P, BLOCK_N_X, P2, N2, BIDIRECTIONAL, UNTIED, SHIFT, HAS_SEQ, HAS_D, D_CHANNELS, STAGES_X, TMA,
            ROW_TMA, PRECISION,
        )  # fmt: skip
    else:
        i_n = i_part % BLOCKS_N
        o_n = i_n * BLOCK_N_BC
        i_part //= BLOCKS_N
        i_g = i_part // STEP_BC
        i_part %= STEP_BC
        i_first = i_g * (H // G) + i_part
        o_l = i_c * K + i_half * Q
        o_far = i_c * K + (1 - i_half) * Q
        grad_bc_rows(
            i_b, i_c, i_half, i_n, i_g, i_part, i_first, STEP_BC, o_n, o_l, o_far, x, dy, B, C, seq, states,
            grad_states, rows, dB, dC, lines, crossing, L, CHUNKS, NB, H, G, P, N, Q, HALVES, HEADS_BC, LINES, BLOCK_P,
            BLOCK_N_BC, P2, N2, DIRECTIONS, True, BACKWARD, SETS, SHIFT, HAS_SEQ, STAGES_BC, TMA, PRECISION,
        )  # fmt: skip


def gradients(
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
    D: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[GradBC, GradX]:
    """What `grad_bc` and `grad_x` give, with their lines of `lines`. Where the sides have matrices of their own the
    backward one is a launch by itself."""
    two = problem.two_matrices
    crossing = room_for_crossing(problem, config, x.device)
    dB, dC = room_for_sums(problem, config, B[0], C[0])
    dx, dD = room_for_x(problem, config, x, D)
    cut_twice = config.tma and config.block_n != config.grad_bc_block_n
    _launch(problem, config, 0 if D is None else D.dim(), seq_idx is not None)(
        x=x,
        dy=dy,
        B=B[0],
        C=C[0],
        B_x=B[0] if cut_twice else None,
        C_x=C[0] if cut_twice else None,
        B_back=B[1] if two else None,
        C_back=C[1] if two else None,
        D=D,
        seq=seq_idx,
        states=states,
        grad_states=grad_states,
        grad_states_x=grad_states if cut_twice else None,
        rows=rows,
        rows_x=rows if has_row_tma(config) else None,
        dB=dB,
        dC=dC,
        dx=dx,
        lines=lines,
        crossing=crossing,
        dD=dD,
    )
    sides = [(dB, dC)]
    if two:
        common = (problem, config, x, dy, B, C, states, grad_states, rows, lines, crossing, seq_idx)
        sides.append(one_side(*common, forward=False, backward=True))
    return GradBC(*sum_sides(problem, config, sides, B, C), crossing), GradX(dx, dD)


@once_a_form
def _launch(problem: Problem, config: Config, dims_D: int, seq: bool) -> Launch:
    """`dims_D`: 0 where there is no D. `seq`: whether it is there."""
    b, q, width = problem.b, config.rows, config.grad_bc_block_n
    wide = tiles((b, problem.l, problem.h, problem.p), q, config.block_p)
    shape, of_states = (b, problem.l, problem.g, problem.n), problem.states_shape(config)
    narrow, states = tiles(shape, q, width), line_tiles(of_states, config.block_p, width)
    narrow_x, states_x = tiles(shape, q, config.block_n), line_tiles(of_states, config.block_p, config.block_n)
    sums = tiles((bc_parts(problem, config) * b, *shape[1:]), q, width)
    descriptors = dict(x=wide, dy=wide, dx=wide, B=narrow, C=narrow, states=states, grad_states=states)
    descriptors |= dict(B_x=narrow_x, C_x=narrow_x, B_back=narrow_x, C_back=narrow_x, grad_states_x=states_x)
    descriptors |= dict(dB=sums, dC=sums, rows_x=line_tiles(problem.rows_shape(config), 1, q))
    parts = problem.h // config.grad_bc_heads * (problem.n2 // width) + problem.h // config.grad_x_heads
    return Launch(
        gradients_kernel,
        problem.row_blocks(config) * parts,
        problem.device,
        descriptors if config.tma else {},
        **gradient_settings(problem, config, seq),
        **x_settings(problem, config, dims_D),
        NB=b,
        GROUP=config.group,
        HEADS_BC=config.grad_bc_heads,
        HEADS_X=config.grad_x_heads,
        BLOCK_N_BC=width,
        BLOCK_N_X=config.block_n,
        STAGES_BC=config.grad_bc_stages,
        STAGES_X=config.grad_x_stages,
    )
