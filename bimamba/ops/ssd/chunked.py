"""The SSD operator, chunk by chunk, in plain PyTorch with plain autograd: the path for CPUs, and for any device.

The mathematics of both directions at once. Within a chunk of length q, with the inclusive sum `s_t = sum_{k<=t} a_k`
and the exclusive sum `e_t = s_t - a_t` of `a = delta A`:

1. its own states:  `Sf = sum_j exp(s_last - s_j) B_j (delta_j x_j)^T`,  `Sb = sum_j exp(e_j) B_j (delta_j x_j)^T`
2. passing: `Sf` runs left to right, `Sb` right to left, both times `exp(s_last)` of the chunk that they cross
3. the chunk's own tokens: one matrix for both directions, whose lower triangle decays by `exp(s_i - s_j)` and whose
   upper one by `exp(e_j - e_i)`, so that a second direction costs no second product
4. the states that enter: `y_i += exp(s_i) C_i Sf + exp(s_last - e_i) C_i Sb`

No exponent is ever positive, so strong decays underflow to zero and nothing overflows. The shifted form reads `C` and
the sums of the neighbouring row (`e_i` for `s_i` forward, `s_i` for `e_i` backward). On a CPU the passes over memory
count, not the arithmetic: weights go onto `B` and `C`, the narrower operands, and both directions share a product.

Shapes carry their axes as suffixes: b batch, c chunk, h head, g group, r head in group (h = g r), q position in the
chunk, d direction, n state, p head size.
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
    return_final_states: bool = True,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Arguments and results as of `ssd_reference`; `y` in the dtype of `x`, states in float32 (float64 for float64).

    bf16 and fp16 inputs are computed in float32. `chunk_size` None chooses the fastest; it does not change the result.
    Without `return_final_states` the states are None, and a sequence of a single chunk needs none at all.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    l, p, n = x.shape[1], x.shape[-1], forward.B.shape[-1]
    q = chunk_size or best_chunk(l, p, n)
    q = q if q < l else l  # not min(): of a free length, a compiler would carry it through every shape
    pad = -l % q
    tied = backward is forward

    def cut(t: Tensor) -> Tensor:
        """(b, l, ...) -> (b, c, q, ...), padded with zeros: a step of size zero moves no state and adds nothing"""
        t = F.pad(t, [0, 0] * (t.dim() - 2) + [0, pad]) if pad else t
        return t.to(dtype).unflatten(1, (-1, q))

    idx_bcq = None
    if seq_idx is not None:  # padding belongs to the last sequence
        idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, pad)], dim=1) if pad else seq_idx
        idx_bcq = idx.unflatten(1, (-1, q))

    x_bchqp = cut(x).transpose(2, 3).contiguous()
    reads = []
    for reverse, direction in enumerate(d for d in (forward, backward) if d is not None):
        if not (reverse and tied):
            delta = cut(step_size(direction.dt, direction.dt_bias, dt_softplus, dt_limit, dtype)).transpose(2, 3)
            s = (delta * direction.A.to(dtype)[:, None]).cumsum(dim=-1)  # (b, c, h, q)
            e = F.pad(s[..., :-1], (1, 0))
            xd = x_bchqp * delta[..., None]
        turn = flip if reverse else _same
        C = cut(turn(shift_down(turn(direction.C), turn(seq_idx))) if shift else direction.C)
        reads.append(_Read(cut(direction.B), C, s, e, (s if reverse else e) if shift else (e if reverse else s), xd))

    y = _within(reads, tied, shift, idx_bcq)
    finals: tuple[Tensor | None, ...] = (None, None)
    if q < l or return_final_states or any(state is not None for state in initial_states):
        own, decay = _own_states(reads, tied, idx_bcq)
        states = [None if s is None else s.to(dtype).mT for s in initial_states]
        passed = [_pass(o, d, s, i) for i, (o, d, s) in enumerate(zip(own, decay, states, strict=False))]
        y = _add_states(y, reads, [before for before, _ in passed], idx_bcq)
        finals = (*(final.mT for _, final in passed), None)
    y = y.transpose(2, 3).flatten(1, 2)[:, :l]
    if D is not None:
        y = torch.addcmul(y, (D if D.dim() == 2 else D[:, None]).to(dtype), x.to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return (y.to(x.dtype), finals[0], finals[1]) if return_final_states else (y.to(x.dtype), None, None)


def best_chunk(l: int, p: int, n: int) -> int:
    """The chunk length at which the q x q matrices weigh about as much as the p x n states, a power of two.

    A short sequence is faster as a single chunk, which has no states. Milliseconds of a forward and backward pass, one
    core, h4 (b l p n: chunk 16, 32, 64, l): 8 251 32 16: 18, 12, 14, 37; 8 251 32 64: 38, 30, 27, 100;
    16 96 32 32: 15, 14, 20, 9; 16 128 32 16: 12, 10, 11, 21; 16 128 32 64: 41, 28, 26, 15; 16 192 32 64: 70 41 41 82.
    """
    q = min(128, max(16, 2 ** math.ceil(math.log2(p * n) / 2)))
    return l if l <= min(3 * q, 128) else q


class _Read:
    """What a direction reads, in chunks: `B, C (b, c, q, g, n)`, sums `s, e, row (b, c, h, q)`, `xd (b, c, h, q, p)`.

    `row` is the sum that goes with row i of `C`: s (forward) or e (backward), the neighbour's in the shifted form.
    """

    def __init__(self, B: Tensor, C: Tensor, s: Tensor, e: Tensor, row: Tensor, xd: Tensor) -> None:
        self.B, self.C, self.s, self.e, self.row, self.xd = B, C, s, e, row, xd


def _same(t):
    return t


def _weigh(t_bcqgn: Tensor, weight_bchq: Tensor) -> Tensor:
    """B or C with a weight a head: `(b, c, h, q, n)`."""
    t_bcg1qn = t_bcqgn.transpose(2, 3).unsqueeze(3)
    return (t_bcg1qn * weight_bchq.unflatten(2, (t_bcqgn.shape[3], -1))[..., None]).flatten(2, 3)


def _within(reads: list[_Read], tied: bool, shift: bool, idx_bcq: Tensor | None) -> Tensor:
    """3. The output that a chunk's own tokens give, `(b, c, h, q, p)`, by one product for tied directions."""
    q = reads[0].s.shape[-1]
    i = torch.arange(q, device=reads[0].s.device)
    lower = i[:, None] > i if shift else i[:, None] >= i
    same = None if idx_bcq is None else (idx_bcq[..., :, None] == idx_bcq[..., None, :])[:, :, None]

    def product(read: _Read) -> Tensor:  # (b, c, g, q, q): shared by the heads of a group
        return read.C.transpose(2, 3) @ read.B.permute(0, 1, 3, 4, 2)

    def exponent(reverse: int) -> Tensor:  # (b, c, h, q, q); the sign is turned on the vectors, which are small
        read = reads[reverse]
        row, column = (-read.row, read.e) if reverse else (read.row, -read.s)
        return row[..., :, None] + column[..., None, :]

    def apply(CB: Tensor, exponent: Tensor, keep: Tensor | None, xd: Tensor) -> Tensor:
        if keep is not None:
            exponent = torch.where(keep, exponent, -torch.inf)
        M = CB.unsqueeze(3) * torch.exp(exponent).unflatten(2, (CB.shape[2], -1))
        return M.flatten(2, 3) @ xd

    if len(reads) == 2 and tied:
        both = torch.where(lower, exponent(0), exponent(1))
        CB = product(reads[0])
        if shift:  # the diagonal belongs to neither direction
            CB = torch.where(lower, CB, torch.where(lower.T, product(reads[1]), 0.0))
            both = torch.where(i[:, None] == i, 0.0, both)
        else:  # and here to both
            CB = CB * (1.0 + torch.eye(q, dtype=CB.dtype, device=CB.device))
        return apply(CB, both, same, reads[0].xd)
    parts = []
    for reverse, read in enumerate(reads):
        triangle = lower.T if reverse else lower
        parts.append(apply(product(read), exponent(reverse), triangle if same is None else triangle & same, read.xd))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _own_states(reads: list[_Read], tied: bool, idx_bcq: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """1. The states of each chunk by itself, `(b, c, h, n, p)` a direction, and the decay across it, `(b, c, h)`."""
    weights, decays = [], []
    for reverse, read in enumerate(reads):
        last = read.s[..., -1:]
        weight, decay = torch.exp(read.e if reverse else last - read.s), torch.exp(last.squeeze(-1))
        if idx_bcq is not None:
            leaves = idx_bcq[..., 0] if reverse else idx_bcq[..., -1]
            weight = weight * (idx_bcq == leaves[..., None])[:, :, None]
            decay = decay * (leaves == _entering(idx_bcq, reverse))[..., None]
        weights.append(weight)
        decays.append(decay)
    if len(reads) == 2 and tied:
        both = torch.cat([_weigh(reads[0].B, w) for w in weights], dim=-1)
        return list((both.mT @ reads[0].xd).chunk(2, dim=-2)), decays
    return [_weigh(r.B, w).mT @ r.xd for r, w in zip(reads, weights, strict=True)], decays


def _pass(own: Tensor, decay: Tensor, state: Tensor | None, reverse: int) -> tuple[Tensor, Tensor]:
    """2. Runs states over chunks: what enters each, `(b, c, h, n, p)`, and the final state `(b, h, n, p)`."""
    carry = torch.zeros_like(own[:, 0]) if state is None else state
    if torch.compiler.is_compiling():  # a loop over chunks would be compiled anew for each number of them
        return _pass_at_once(own, decay, carry, reverse)
    before = []
    # unbind, not own[:, i]: the gradient of an index is a tensor of the full size, for every chunk
    chunks = list(zip(own.unbind(1), decay[..., None, None].unbind(1), strict=True))
    for own_state, crossed in reversed(chunks) if reverse else chunks:
        before.append(carry)
        carry = torch.addcmul(own_state, carry, crossed)
    if reverse:
        before.reverse()
    return torch.stack(before, dim=1), carry


def _pass_at_once(own: Tensor, decay: Tensor, state: Tensor, reverse: int) -> tuple[Tensor, Tensor]:
    """`_pass` as one product with a (chunks + 1) x (chunks + 1) matrix of decays; `state (b, h, n, p)`."""
    if reverse:
        own, decay = own.flip(1), decay.flip(1)
    own_bhjs = torch.cat([state[:, None], own], dim=1).transpose(1, 2).flatten(3)
    # zero, where another sequence begins or a decay underflows, has no logarithm; the least number has one
    a_bhi = F.pad(decay.clamp(min=torch.finfo(decay.dtype).tiny).log(), (0, 0, 1, 0)).mT
    i = torch.arange(a_bhi.shape[-1], device=own.device)
    sums = torch.where(i[:, None] > i, a_bhi[..., :, None], 0.0).cumsum(dim=-2)
    decays = torch.exp(torch.where(i[:, None] >= i, sums, -torch.inf))
    passed = (decays @ own_bhjs).unflatten(-1, own.shape[-2:]).transpose(1, 2)
    before = passed[:, :-1]
    return (before.flip(1) if reverse else before), passed[:, -1]


def _add_states(y: Tensor, reads: list[_Read], before: list[Tensor], idx_bcq: Tensor | None) -> Tensor:
    """4. Adds what the entering states give: `y (b, c, h, q, p)`, `before (b, c, h, n, p)` a direction."""
    rows = []
    for reverse, read in enumerate(reads):
        weight = torch.exp(read.s[..., -1:] - read.row if reverse else read.row)
        if idx_bcq is not None:
            weight = weight * (idx_bcq == _entering(idx_bcq, reverse)[..., None])[:, :, None]
        rows.append(_weigh(read.C, weight))
    reading, states = torch.cat(rows, dim=-1), torch.cat(before, dim=-2)
    return torch.baddbmm(y.flatten(0, 2), reading.flatten(0, 2), states.flatten(0, 2)).view_as(y)


def _entering(idx_bcq: Tensor, reverse: int) -> Tensor:
    """The sequence of the token before the chunk in this direction, `(b, c)`; at the edge, the first token's own."""
    if reverse:
        return torch.cat([idx_bcq[:, 1:, 0], idx_bcq[:, -1:, -1]], dim=1)
    return torch.cat([idx_bcq[:, :1, 0], idx_bcq[:, :-1, -1]], dim=1)
