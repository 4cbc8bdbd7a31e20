"""The two passes, composed of the stages. Tensors are contiguous here, `A`, `D`, `dt_bias` and states fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .choose import Problem, choose
from .gate import grad_gate
from .grad_bc import grad_bc
from .grad_dt import grad_dt
from .grad_x import grad_x
from .gradients import gradients
from .output import scan_output
from .states import chunk_states


class Inputs(NamedTuple):
    """What a scan reads. Pairs are (forward, backward); tied directions hold the same tensor twice."""

    x: Tensor  # (b, l, h, p)
    dt: tuple[Tensor, Tensor]  # (b, l, h), rows at one distance
    A: tuple[Tensor, Tensor]  # (h)
    B: tuple[Tensor, Tensor]  # (b, l, g, n)
    C: tuple[Tensor, Tensor]  # (b, l, g, n)
    bias: tuple[Tensor | None, Tensor | None]  # (h)
    D: Tensor | None  # (h) or (h, p)
    z: Tensor | None  # (b, l, h, p)
    seq_idx: Tensor | None  # (b, l) int32
    initial: tuple[Tensor | None, Tensor | None]  # (b, h, p, n): both or none
    mask: Tensor | None = None  # (b, l) uint8: 0 where the step size is zero, whatever dt is


class Saved(NamedTuple):
    """What the backward pass takes over from the forward pass. Without states it computes them again."""

    states: Tensor | None
    rows: Tensor | None
    ungated: Tensor | None


class Gradients(NamedTuple):
    """Those of A, bias and D in parts: see `totals`."""

    x: Tensor
    B: tuple[Tensor, Tensor | None]
    C: tuple[Tensor, Tensor | None]
    heads: Tensor  # (parts, 2, sets * h): of A and bias
    D: Tensor | None  # (parts, h) or (parts, h, p)
    z: Tensor | None
    initial: Tensor | None  # (2, b, h, p, n) fp32


def scan_forward(
    problem: Problem, t: Inputs, *, save: bool, keep_ungated: bool, final: bool
) -> tuple[Tensor, Tensor | None, Saved]:
    """`y`, the states in the end `(directions, b, h, p, n)` fp32 if `final`, and what the backward pass needs."""
    config = choose(problem, saved=save, backward=False)
    rows = torch.empty(problem.rows_shape(config), dtype=torch.float32, device=t.x.device)
    ends = _edges(problem, t.x.device) if final else None
    leave = (None, None) if ends is None else (ends[-1], ends[0])
    states = _states(problem, config, t, rows, leave=leave)
    y, ungated = _output(problem, config, t, states, rows, keep_ungated)
    return y, ends, Saved(states if save else None, rows if save else None, ungated)


def scan_backward(
    problem: Problem, t: Inputs, saved: Saved, dy: Tensor, dfinal: Tensor | None, ddt: tuple[Tensor, Tensor]
) -> Gradients:
    """All gradients, from `dy` and, where the final states were used, `dfinal (directions, b, h, p, n)` fp32; `ddt`, as
    `t.dt`, is written."""
    keeps = saved.states is not None
    config = choose(problem, saved=keeps, backward=True)
    states, rows = saved.states, saved.rows
    if not keeps:
        rows = torch.empty(problem.rows_shape(config), dtype=torch.float32, device=t.x.device)
        states = _states(problem, config, t, rows)
    dz = None
    if t.z is not None:
        ungated = saved.ungated
        if ungated is None:
            ungated, _ = _output(problem, config, t._replace(z=None), states, rows)
        dy, dz = grad_gate(dy, ungated, t.z)
    dinitial = _edges(problem, t.x.device) if t.initial[0] is not None else None
    grad_states = chunk_states(
        problem,
        config,
        dy,
        t.C[0],
        t.C[1],
        rows,
        seq_idx=t.seq_idx,
        # The gradient of what left on the right comes in from the right
        enter=(None, None) if dfinal is None else (dfinal[-1], dfinal[0]),
        leave=(None, None) if dinitial is None else (dinitial[0], dinitial[-1]),
        grad=True,
    )
    lines = torch.empty(problem.lines_shape(config), dtype=torch.float32, device=t.x.device)
    if keeps and config.together:
        common = (problem, config, t.x, dy, t.B, t.C, states, grad_states, rows, lines)
        of_bc, of_x = gradients(*common, D=t.D, seq_idx=t.seq_idx)
    else:
        of_bc = grad_bc(problem, config, t.x, dy, t.B, t.C, states, grad_states, rows, lines, seq_idx=t.seq_idx)
        del states  # where they were recomputed, dx takes their place
        of_x = grad_x(problem, config, t.x, dy, t.B, t.C, grad_states, rows, lines, D=t.D, seq_idx=t.seq_idx)
    shape = (problem.b * problem.parts(config), 2, problem.sets * problem.h)
    heads = torch.empty(shape, dtype=torch.float32, device=t.x.device)
    for i in range(problem.sets):
        own = (t.dt[i], t.A[i], t.bias[i], t.mask, rows, lines, of_bc.crossing, ddt[i], heads)
        grad_dt(problem, config, *own, forward=i == 0, backward=problem.bidirectional and i == problem.sets - 1)
    dB, dC = (of_bc.dB, of_bc.dB_back), (of_bc.dC, of_bc.dC_back)
    return Gradients(x=of_x.dx, B=dB, C=dC, heads=heads, D=of_x.dD, z=dz, initial=dinitial)


def _states(problem: Problem, config, t: Inputs, rows: Tensor, leave=(None, None)) -> Tensor:
    return chunk_states(
        problem,
        config,
        t.x,
        t.B[0],
        t.B[1],
        rows,
        dt=t.dt,
        A=t.A,
        bias=t.bias,
        mask=t.mask,
        seq_idx=t.seq_idx,
        enter=t.initial,
        leave=leave,
    )


def _output(problem: Problem, config, t: Inputs, states: Tensor, rows: Tensor, keep_ungated: bool = False):
    return scan_output(
        problem,
        config,
        t.x,
        t.B[0],
        t.C[0],
        t.B[1],
        t.C[1],
        states,
        rows,
        D=t.D,
        z=t.z,
        seq_idx=t.seq_idx,
        keep_ungated=keep_ungated,
    )


def _edges(problem: Problem, device: torch.device) -> Tensor:
    """Room for the states at the sequence's ends, one a direction."""
    shape = (problem.directions, problem.b, problem.h, problem.p, problem.n)
    return torch.empty(shape, dtype=torch.float32, device=device)
