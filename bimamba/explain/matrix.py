"""The scan of a layer as the matrix that it is: `y = M x + c`, one M a head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bimamba.explain.record import Scan
from bimamba.ops.ssd.reference import Direction, causal_matrix, flip, ssd_reference


class Mixing(NamedTuple):
    """`y[:, h] = matrix[h] @ x[:, h] + constant[:, h]`, in float64.

    matrix: `(h, l, l)`, row i: what token i takes from every token, itself (and `D`) included.
    constant: `(l, h, p)`, what learned initial states add; zero without them.
    error: of `M x + c` against what the layer's scan returned, `|M x + c - y| / |y|`.
    """

    matrix: Tensor
    constant: Tensor
    error: float


def mixing_matrix(scan: Scan, row: int = 0, max_length: int = 1024) -> Mixing:
    """The exact mixing matrix of one row of a recorded scan (Dao and Gu 2024, arXiv:2405.21060; its bidirectional sum
    and quasi-separable form: Hwang et al. 2024, arXiv:2407.09941).

    Args:
        scan: as recorded; `x (b, l, h, p)`.
        row: of the batch.
        max_length: the most tokens; the matrices of all heads take `8 h l^2` bytes.

    Raises:
        ValueError: more tokens than `max_length`, no such row, or a `D` of `(h, p)`, for which each channel has a
            matrix of its own.
    """
    b, l, h, _ = scan.x.shape
    if l > max_length:
        raise ValueError(
            f"explain.matrices.max_length: a mixing matrix of {l} x {l} tokens was asked for, expected at most "
            f"{max_length} tokens; raise it, explain a shorter input, or leave it out by explain.matrices.enabled=false"
        )
    if not 0 <= row < b:
        raise ValueError(f"row: expected 0 to {b - 1}, got {row}")
    if scan.D is not None and scan.D.dim() != 1:
        raise ValueError(f"D: expected (h) = ({h},), got {tuple(scan.D.shape)}")
    scan = _one_row(scan, row)
    M = _direction_matrix(scan, scan.forward)
    if scan.backward is not None:
        M = M + _direction_matrix(scan, scan.backward, turned=True)
    if scan.D is not None:
        M = M + torch.diag_embed(scan.D[:, None].expand(h, l))
    nothing = replace(scan, x=torch.zeros_like(scan.x))
    constant = ssd_reference(nothing.x, nothing.forward, nothing.backward, D=nothing.D, **nothing.options)[0][0]
    y = torch.einsum("hij,jhp->ihp", M, scan.x[0]) + constant
    error = (y - scan.y[0]).norm() / scan.y[0].norm().clamp(min=1e-30)
    return Mixing(M, constant, float(error))


def _direction_matrix(scan: Scan, direction: Direction, turned: bool = False) -> Tensor:
    """`(h, l, l)`: the lower triangle of the forward direction, or the upper one of the backward direction."""
    heads = scan.x.shape[2] // direction.B.shape[2]
    seq_idx = scan.options["seq_idx"]
    parts = [scan.step_sizes(direction), *(t.repeat_interleave(heads, dim=2) for t in (direction.B, direction.C))]
    if turned:
        parts, seq_idx = [flip(t) for t in parts], flip(seq_idx)
    delta, B, C = parts
    M = causal_matrix(delta, direction.A, B, C, seq_idx)[0]
    if scan.options["shift"]:  # row i of the output is row i - 1 of the scan, within its sequence
        M = torch.cat([torch.zeros_like(M[:, :1]), M[:, :-1]], dim=1)
        if seq_idx is not None:
            first = seq_idx[0, 1:] != seq_idx[0, :-1]
            M[:, 1:][:, first] = 0.0
    return M.flip(1, 2) if turned else M


def _one_row(scan: Scan, row: int) -> Scan:
    """One row of a batch in float64 on the CPU, as a batch of one."""

    def cut(t: Any) -> Any:
        return None if t is None else t[row : row + 1].cpu().double()

    def whole(t: Any) -> Any:
        return None if t is None else t.detach().cpu().double()

    def direction(d: Direction) -> Direction:
        return Direction(cut(d.dt), whole(d.A), cut(d.B), cut(d.C), whole(d.dt_bias))

    forward = direction(scan.forward)
    backward = scan.backward
    if backward is not None:
        backward = forward if scan.tied else direction(backward)
    seq_idx = scan.options["seq_idx"]
    options = scan.options | {
        "seq_idx": None if seq_idx is None else seq_idx[row : row + 1].cpu().long(),
        "initial_states": tuple(cut(None if s is None else s.detach()) for s in scan.options["initial_states"]),
    }
    return Scan(cut(scan.x), cut(scan.y), forward, backward, whole(scan.D), options)
