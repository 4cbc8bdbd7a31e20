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

# ruff: noqa: SIM102 - branches on constexpr flags compile one side only; ternaries and `and` would not

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba.ops.launch import Launch, once_a_form

from .choose import Config, Problem
from .descriptors import line_tiles, tiles
from .grad_bc import grad_bc_rows
from .grad_x import grad_x_rows
from .reduce import reduce_parts


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
    BC: tl.constexpr,
    X: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
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
    PARTS_BC: tl.constexpr = (H // HEADS_BC) * (N2 // BLOCK_N_BC) if BC else 0
    PARTS_X: tl.constexpr = H // HEADS_X if X else 0
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
    if X:
        if is_x:
            grad_x_rows(
                i_b, i_c, i_half, i_part, x, dy, B if B_x is None else B_x, C if C_x is None else C_x, B_back, C_back,
                D, seq, grad_states if grad_states_x is None else grad_states_x, rows if rows_x is None else rows_x,
                rows, dx, lines, dD, L, CHUNKS, H, G, P, N, Q, HALVES, HEADS_X, LINES, BLOCK_P, BLOCK_N_X, P2, N2,
                BIDIRECTIONAL, UNTIED, SHIFT, HAS_SEQ, HAS_D, D_CHANNELS, STAGES_X, TMA, ROW_TMA, PRECISION,
            )  # fmt: skip
    if BC:
        if not is_x:
            grad_bc_rows(
                i_b, i_c, i_half, i_part, x, dy, B, C, seq, states, grad_states, rows, dB, dC, lines, crossing, L,
                CHUNKS, NB, H, G, P, N, Q, HALVES, HEADS_BC, LINES, BLOCK_P, BLOCK_N_BC, P2, N2, DIRECTIONS, FORWARD,
                BACKWARD, SETS, SHIFT, HAS_SEQ, STAGES_BC, TMA, PRECISION,
            )  # fmt: skip


class GradBC(NamedTuple):
    """dB and dC `(b, l, g, n)`, those of the backward direction (untied only), and `crossing (b * row blocks, h, 2,
    blocks of n)`, which grad_dt reads."""

    dB: Tensor
    dC: Tensor
    dB_back: Tensor | None
    dC_back: Tensor | None
    crossing: Tensor


class GradX(NamedTuple):
    """dx `(b, l, h, p)`, and dD in parts `(b * row blocks, h)` or `(b * row blocks, h, p)`."""

    dx: Tensor
    dD: Tensor | None


def gradients(
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
    states: Tensor | None = None,
    D: Tensor | None = None,
    seq_idx: Tensor | None,
    of_bc: bool = True,
    of_x: bool = True,
) -> tuple[GradBC | None, GradX | None]:
    """Both stages, or one of them: `of_bc`, which reads `states`, and `of_x`, which reads `D`. Each writes its lines of
    `lines`. B, C: pairs (forward, backward)."""
    two = problem.two_matrices
    row_blocks = _row_blocks(problem, config)
    crossing = dx = dD = None
    if of_bc:
        shape = (row_blocks, problem.h, 2, problem.n2 // config.grad_bc_block_n)
        crossing = torch.empty(shape, dtype=torch.float32, device=x.device)
    if of_x:
        dx = torch.empty_like(x)
        if D is not None:
            # A row block that lies wholly beyond the end is left out: its part must read as zero
            make = torch.empty if problem.b * problem.parts(config) == row_blocks else torch.zeros
            dD = make((row_blocks, *D.shape), dtype=torch.float32, device=x.device)
    # One launch; two where grad_bc takes the sides apart: the second has nothing to share with grad_x
    sides = [(True, problem.bidirectional and not two)] + ([(False, True)] if two and of_bc else [])
    sums = []
    for i, (forward, backward) in enumerate(sides):
        with_x = of_x and i == 0
        dB, dC = _room(problem, config, B[i], C[i]) if of_bc else (None, None)
        cut_twice = config.tma and of_bc and with_x and config.block_n != config.grad_bc_block_n
        form = (of_bc, with_x, forward, backward, 0 if D is None else D.dim(), seq_idx is not None)
        _launch(problem, config, *form)(
            x=x,
            dy=dy,
            B=B[i],
            C=C[i],
            B_x=B[i] if cut_twice else None,
            C_x=C[i] if cut_twice else None,
            B_back=B[1] if two and with_x else None,
            C_back=C[1] if two and with_x else None,
            D=D if with_x else None,
            seq=seq_idx,
            states=states,
            grad_states=grad_states,
            grad_states_x=grad_states if cut_twice else None,
            rows=rows,
            rows_x=rows if with_x and _row_tma(config) else None,
            dB=dB,
            dC=dC,
            dx=dx if with_x else None,
            lines=lines,
            crossing=crossing,
            dD=dD if with_x else None,
        )
        sums.append((dB, dC))
    return (
        None if crossing is None else GradBC(*_summed(problem, config, sums, B, C), crossing),
        None if dx is None else GradX(dx, dD),
    )


def _row_blocks(problem: Problem, config: Config) -> int:
    return problem.b * problem.chunks(config) * config.halves


def _row_tma(config: Config) -> bool:
    return config.tma and config.grad_x_row_tma


def _parts(problem: Problem, config: Config) -> int:
    """Of the heads of a group, each by a program of grad_bc of its own."""
    return problem.h // problem.g // config.grad_bc_heads


def _whole(problem: Problem, config: Config) -> bool:
    """Whether a launch writes dB and dC themselves, and not parts that remain to be summed."""
    return _parts(problem, config) == 1 and not problem.shift and (problem.untied or not problem.two_matrices)


def _room(problem: Problem, config: Config, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """For dB and dC of a launch."""
    if _whole(problem, config):
        return torch.empty_like(B), torch.empty_like(C)
    shape = (_parts(problem, config) * problem.b, *B.shape[1:])
    dB, dC = (torch.empty(shape, dtype=torch.float32, device=B.device) for _ in range(2))
    return dB, dC


def _summed(
    problem: Problem, config: Config, sums: list, B: tuple[Tensor, Tensor], C: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dB, dC, and those of the backward direction, from what the launches wrote."""
    (dB, dC), (dB_back, dC_back) = sums[0], sums[-1]
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
def _launch(
    problem: Problem, config: Config, of_bc: bool, of_x: bool, forward: bool, backward: bool, dims_D: int, seq: bool
) -> Launch:
    """`dims_D`: 0 where there is no D. `seq`: whether it is there."""
    b, q, chunks, width = problem.b, config.rows, problem.chunks(config), config.grad_bc_block_n
    wide = tiles((b, problem.l, problem.h, problem.p), q, config.block_p)
    shape = (b, problem.l, problem.g, problem.n)
    narrow_bc, narrow_x = tiles(shape, q, width), tiles(shape, q, config.block_n)
    sums = tiles((_parts(problem, config) * b, *shape[1:]), q, width)
    states_bc, states_x = (line_tiles(problem.states_shape(config), config.block_p, n) for n in (width, config.block_n))
    narrow, states = (narrow_bc, states_bc) if of_bc else (narrow_x, states_x)
    descriptors = dict(x=wide, dy=wide, dx=wide, B=narrow, C=narrow, states=states, grad_states=states)
    descriptors |= dict(B_x=narrow_x, C_x=narrow_x, B_back=narrow_x, C_back=narrow_x, grad_states_x=states_x)
    descriptors |= dict(dB=sums, dC=sums, rows_x=line_tiles(problem.rows_shape(config), 1, q))
    parts = (problem.h // config.grad_bc_heads) * (problem.n2 // width) * of_bc
    parts += (problem.h // config.grad_x_heads) * of_x
    return Launch(
        gradients_kernel,
        _row_blocks(problem, config) * parts,
        problem.device,
        descriptors if config.tma else {},
        L=problem.l,
        CHUNKS=chunks,
        NB=b,
        GROUP=config.group,
        HEADS_BC=config.grad_bc_heads,
        HEADS_X=config.grad_x_heads,
        H=problem.h,
        G=problem.g,
        P=problem.p,
        N=problem.n,
        Q=q,
        HALVES=config.halves,
        LINES=problem.lines(config),
        BLOCK_P=config.block_p,
        BLOCK_N_BC=width,
        BLOCK_N_X=config.block_n,
        P2=problem.p2,
        N2=problem.n2,
        BC=of_bc,
        X=of_x,
        FORWARD=forward,
        BACKWARD=backward,
        BIDIRECTIONAL=problem.bidirectional,
        UNTIED=problem.untied,
        SHIFT=problem.shift,
        HAS_SEQ=seq,
        HAS_D=dims_D > 0,
        D_CHANNELS=dims_D == 2,
        STAGES_BC=config.grad_bc_stages,
        STAGES_X=config.grad_x_stages,
        TMA=config.tma,
        ROW_TMA=of_x and _row_tma(config),
        PRECISION=problem.precision,
        num_warps=config.grad_warps,
    )
