"""The SSD operator, chunk by chunk, in plain PyTorch with plain autograd: the path for CPUs, and for any device.

The mathematics of DESIGN (section 3) for both directions at once. Within a chunk of length q, with the inclusive sum
`s_t = sum_{k<=t} a_k` and the exclusive sum `e_t = s_t - a_t` of `a = delta A`:

1. the chunk's own states:  `Sf = sum_j exp(s_last - s_j) delta_j x_j B_j^T`,  `Sb = sum_j exp(e_j) delta_j x_j B_j^T`
2. passing: `Sf` runs left to right, `Sb` right to left, both times `exp(s_last)` of the chunk that they cross
3. output: one matrix for both directions, whose lower triangle decays by `exp(s_i - s_j)` and whose upper by
   `exp(e_j - e_i)`, so that a second direction costs no second product
4. `y_i += exp(s_i) C_i Sf_before + exp(s_last - e_i) C_i Sb_after`

No exponent is ever positive, so strong decays underflow to zero and nothing overflows. The shifted form reads `C` and
the sums of the neighbouring row (`e_i` for `s_i` forward, `s_i` for `e_i` backward). Layouts keep `(q, h, p)` as the
inputs have it: steps 1 and 4 are then one product per group over all its heads, without a transpose.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import Direction, flip, shift_down, step_size


def ssd_chunked(
    x: Tensor,
    forward: Direction,
    backward: Direction | None = None,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    seq_idx: Tensor | None = None,
    initial_states: tuple[Tensor | None, Tensor | None] = (None, None),
    shift: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments and results as of `ssd_reference`; `y` in the dtype of `x`, states in float32 (float64 for float64).

    bf16 and fp16 inputs are computed in float32. `chunk_size` None chooses the fastest; it does not change the result.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    _, l, h, p = x.shape
    g, n = forward.B.shape[2:]
    q = min(chunk_size or best_chunk(p, n), l)
    pad = -l % q
    tied = backward is forward

    def cut(t: Tensor) -> Tensor:
        """(b, l, ...) -> (b, c, q, ...), padded with zeros: a step of size zero moves no state and adds nothing"""
        t = t.to(dtype)
        t = F.pad(t, [0, 0] * (t.dim() - 2) + [0, pad]) if pad else t
        return t.unflatten(1, (-1, q))

    xs = cut(x)
    idx = None
    if seq_idx is not None:  # padding belongs to the last sequence
        idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, pad)], dim=1) if pad else seq_idx
        idx = idx.unflatten(1, (-1, q))

    def sums(direction: Direction) -> tuple[Tensor, Tensor, Tensor]:
        delta = cut(step_size(direction.dt, direction.dt_bias, dt_softplus, dt_limit, dtype))
        a = delta * direction.A.to(dtype)
        s = a.cumsum(dim=2)  # (b, c, q, h)
        return delta, s, s - a

    def rows(direction: Direction, turn) -> Tensor:
        """The rows of C that a direction reads: its own, or the neighbour's in the shifted form."""
        return cut(turn(shift_down(turn(direction.C), turn(seq_idx))) if shift else direction.C)

    delta, s, e = sums(forward)
    C, B = rows(forward, lambda t: t), cut(forward.B)
    xd = xs * delta[..., None]
    states = [(xd, torch.exp(s[:, :, -1:] - s), B, s[:, :, -1])]
    reads = [(C, torch.exp(e if shift else s))]
    parts = [(C, B, e if shift else s, s, xd)]
    if backward is not None:
        delta_b, s_b, e_b = (delta, s, e) if tied else sums(backward)
        C_b = rows(backward, flip) if shift or not tied else C
        B_b = B if tied else cut(backward.B)
        xd_b = xd if tied else xs * delta_b[..., None]
        states.append((xd_b, torch.exp(e_b), B_b, s_b[:, :, -1]))
        reads.append((C_b, torch.exp(s_b[:, :, -1:] - (s_b if shift else e_b))))
        parts.append((C_b, B_b, -(s_b if shift else e_b), -e_b, xd_b))

    # 1 and 2, and 4
    y, finals = 0.0, []
    for reverse, (own, read, state) in enumerate(zip(states, reads, initial_states, strict=False)):
        before, final = _pass(*_own_states(*own, g, idx, reverse), state, g, n, idx, reverse)
        C_read, weight = read
        if idx is not None:
            weight = weight * _reaches(idx, reverse)[..., None]
        off = _per_group(C_read.transpose(2, 3) @ before).unflatten(-1, (h, p))
        y = y + off * weight[..., None]
        finals.append(final)
    # 3
    y = y + _within(parts, tied, shift, idx, h)

    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(dtype) * xs
    y = y.flatten(1, 2)[:, :l]
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), finals[0], finals[1] if backward is not None else None


def best_chunk(p: int, n: int) -> int:
    """The chunk length at which the q x q matrices weigh about as much as the p x n states, a power of two.

    Measured on two CPU cores, forward and backward (benchmark/benchmark_cpu.py): see `BENCHMARKS.md`.
    """
    return min(128, max(16, 2 ** round(math.log2(math.sqrt(p * n)))))


def _own_states(xd: Tensor, weight: Tensor, B: Tensor, total: Tensor, g: int, idx: Tensor | None, reverse: int):
    """`sum_j weight_j delta_j x_j B_j^T` a chunk, `(b, c, g, n, h/g * p)`, and the decay across it, `(b, c, h)`."""
    decay = torch.exp(total)
    if idx is not None:
        edge = idx[:, :, :1] if reverse else idx[:, :, -1:]
        weight = weight * (idx == edge)[..., None]
        decay = decay * _crosses(idx, reverse)[..., None]
    xw = xd * weight[..., None]
    xw = xw.unflatten(3, (g, -1)).flatten(4).transpose(2, 3)  # (b, c, g, q, h/g * p)
    return B.permute(0, 1, 3, 4, 2) @ xw, decay


def _crosses(idx: Tensor, reverse: int) -> Tensor:
    """Whether what enters a chunk leaves it, `(b, c)`: its two ends and the entry are one sequence."""
    enters = _entering(idx, reverse)
    leaves = idx[:, :, 0] if reverse else idx[:, :, -1]
    return leaves == enters


def _reaches(idx: Tensor, reverse: int) -> Tensor:
    """Whether what enters a chunk reaches token i of it, `(b, c, q)`."""
    return idx == _entering(idx, reverse)[..., None]


def _entering(idx: Tensor, reverse: int) -> Tensor:
    """The sequence of the token before the chunk in this direction, `(b, c)`; at the edge, the first token's own."""
    if reverse:
        return torch.cat([idx[:, 1:, 0], idx[:, -1:, -1]], dim=1)
    return torch.cat([idx[:, :1, 0], idx[:, :-1, -1]], dim=1)


def _pass(own: Tensor, decay: Tensor, state: Tensor | None, g: int, n: int, idx, reverse: int):
    """Runs the states over the chunks. Returns what enters each chunk, `(b, c, g, n, h/g * p)`, and the final state."""
    b, c, _, _, width = own.shape
    h = decay.shape[-1]
    p = width * g // h
    own = own.unflatten(-1, (h // g, p))
    decay = decay.view(b, c, g, 1, h // g, 1)
    if state is None:
        carry = own.new_zeros(b, g, n, h // g, p)
    else:
        carry = state.to(own.dtype).view(b, g, h // g, p, n).permute(0, 1, 4, 2, 3)
    before = []
    # unbind, not own[:, i]: the gradient of an index is a tensor of the full size, for every chunk
    chunks = list(zip(own.unbind(1), decay.unbind(1), strict=True))
    for own_states, crossed in reversed(chunks) if reverse else chunks:
        before.append(carry)
        carry = torch.addcmul(own_states, carry, crossed)
    if reverse:
        before.reverse()
    final = carry.permute(0, 1, 3, 4, 2).reshape(b, h, p, n)
    return torch.stack(before, dim=1).flatten(-2), final


def _per_group(y: Tensor) -> Tensor:
    """(b, c, g, q, h/g * p) -> (b, c, q, h * p)"""
    return y.transpose(2, 3).flatten(3)


def _within(parts, tied: bool, shift: bool, idx: Tensor | None, h: int) -> Tensor:
    """The output that a chunk's own tokens give, `(b, c, q, h, p)`, by one product for tied directions."""
    q = parts[0][2].shape[2]
    i = torch.arange(q, device=parts[0][2].device)
    lower = i[:, None] > i[None, :] if shift else i[:, None] >= i[None, :]
    lower, upper = lower, lower.T
    same = None if idx is None else (idx[:, :, None, :, None] == idx[:, :, None, None, :])

    def product(C: Tensor, B: Tensor) -> Tensor:  # (b, c, g, q, q): shared by the heads of a group
        return C.transpose(2, 3) @ B.permute(0, 1, 3, 4, 2)

    def exponent(row: Tensor, column: Tensor) -> Tensor:  # (b, c, h, q, q)
        # the sign is turned on the vector: autograd would otherwise negate the gradient of the whole matrix
        row, column = row.transpose(2, 3), -column.transpose(2, 3)
        return row[..., :, None] + column[..., None, :]

    def apply(CB: Tensor, exponent: Tensor, keep: Tensor | None, xd: Tensor) -> Tensor:
        if keep is not None:
            exponent = torch.where(keep, exponent, -torch.inf)
        M = CB.unsqueeze(3) * torch.exp(exponent).unflatten(2, (CB.shape[2], -1))
        return (M.flatten(2, 3) @ xd.transpose(2, 3)).transpose(2, 3)

    if len(parts) == 2 and tied:
        (C, B, row, column, xd), (C_b, _, row_b, column_b, _) = parts
        CB = product(C, B)
        both = torch.where(lower, exponent(row, column), exponent(row_b, column_b))
        if shift:
            CB = torch.where(lower, CB, torch.where(upper, product(C_b, B), 0.0))
            both = torch.where(i[:, None] == i[None, :], 0.0, both)
        else:
            CB = CB * (1.0 + torch.eye(q, dtype=CB.dtype, device=CB.device))  # the diagonal, in both directions
        return apply(CB, both, same, xd)
    y = 0.0
    for (C, B, row, column, xd), triangle in zip(parts, (lower, upper), strict=False):
        keep = triangle if same is None else triangle & same
        y = y + apply(product(C, B), exponent(row, column), keep, xd)
    return y
