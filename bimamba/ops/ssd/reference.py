"""The oracle: the SSD operator as its recurrence and as its dense matrix. No chunk, no kernel, no speed.

Everything else in this package is tested against these functions, in float64. They follow Dao and Gu,
"Transformers are SSMs" (2024, arXiv:2405.21060) for one direction and Hwang et al., "Hydra" (2024, arXiv:2407.09941)
for the quasi-separable (shifted) form. Shapes: `b` batch, `l` length, `h` heads, `p` head size, `g` groups, `n` state
size; head `i` reads the `B` and `C` of group `i // (h / g)`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class Direction(NamedTuple):
    """What one direction of the scan reads: `dt (b, l, h)`, `A (h)`, `B, C (b, l, g, n)`, `dt_bias (h)`."""

    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    dt_bias: Tensor | None = None


def step_size(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """`delta = clamp(softplus(dt + dt_bias), *dt_limit)` in `dtype`, `(b, l, h)`."""
    delta = dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta, threshold=50.0)  # torch's default threshold, 20, is not exact in float64
    return delta if dt_limit == (0.0, float("inf")) and dt_softplus else delta.clamp(*dt_limit)


def recurrence(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, seq_idx=None, state=None):
    """`h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T`, `y_t = h_t C_t`, one token after the other.

    Args:
        x: `(b, l, h, p)`; delta: `(b, l, h)`; A: `(h)`; B, C: `(b, l, h, n)`, one for every head.
        seq_idx: `(b, l)`; the state is dropped where it changes. state: `(b, h, p, n)` before the first token.

    Returns:
        `y (b, l, h, p)` and the state after the last token.
    """
    b, l, h, p = x.shape
    state = x.new_zeros(b, h, p, B.shape[-1]) if state is None else state
    y = []
    for t in range(l):
        if seq_idx is not None and t > 0:
            same = (seq_idx[:, t] == seq_idx[:, t - 1]).to(x.dtype)
            state = state * same[:, None, None, None]
        decay = torch.exp(delta[:, t] * A)[..., None, None]
        state = state * decay + torch.einsum("bh,bhp,bhn->bhpn", delta[:, t], x[:, t], B[:, t])
        y.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return torch.stack(y, dim=1), state


def dense(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, seq_idx=None, state=None):
    """The same map as a lower triangular matrix: `y_i = sum_{j<=i} exp(s_i - s_j) (C_i . B_j) delta_j x_j`.

    Arguments and results as of `recurrence`.
    """
    M = causal_matrix(delta, A, B, C, seq_idx)
    y = torch.einsum("bhij,bjhp->bihp", M, x)
    s = torch.cumsum(delta * A, dim=1)
    last = torch.exp(s[:, -1:] - s) * delta  # what reaches the final state
    if seq_idx is not None:
        last = last * (seq_idx == seq_idx[:, -1:])[..., None]
    final = torch.einsum("bjh,bjhp,bjhn->bhpn", last, x, B)
    if state is not None:
        reach = torch.exp(s)
        if seq_idx is not None:
            reach = reach * (seq_idx == seq_idx[:, :1])[..., None]
        y = y + torch.einsum("bih,bihn,bhpn->bihp", reach, C, state)
        final = final + reach[:, -1, :, None, None] * state
    return y, final


def causal_matrix(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, seq_idx=None) -> Tensor:
    """The matrix of one direction, `(b, h, l, l)`: row `i` weighs the inputs `j <= i`. Arguments as of `recurrence`."""
    s = torch.cumsum(delta * A, dim=1).transpose(1, 2)  # (b, h, l)
    exponent = s[..., :, None] - s[..., None, :]
    keep = torch.ones(s.shape[-1], s.shape[-1], dtype=torch.bool, device=s.device).tril()
    if seq_idx is not None:
        keep = keep & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])
    decay = torch.exp(exponent.masked_fill(~keep, -torch.inf))
    return torch.einsum("bihn,bjhn->bhij", C, B) * decay * delta.transpose(1, 2)[:, :, None, :]


def shift_down(y: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Row `i` takes row `i - 1` of the same sequence, zero where there is none: `(b, l, ...)`."""
    out = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], dim=1)
    if seq_idx is not None:
        first = torch.ones_like(seq_idx, dtype=torch.bool)
        first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        out = out.masked_fill(first.view(*first.shape, *[1] * (y.dim() - 2)), 0.0)
    return out


T = TypeVar("T", bound="Tensor | None")


def flip(t: T) -> T:
    """Reverses the length, dimension 1."""
    return t if t is None else cast(T, t.flip(1))


def ssd_reference(
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
    method=recurrence,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`y = (SS(x) + flip(SS(flip(x))) + D x) silu(z)`; without `backward` the causal operator.

    Args:
        x, z: `(b, l, h, p)`; forward, backward: the parameters of each direction (the same object if they are tied).
        D: `(h)` or `(h, p)`; seq_idx: `(b, l)`; initial_states: `(b, h, p, n)` each or None.
        shift: Hydra's quasi-separable form, `shift(SS(x)) + flip(shift(SS(flip(x)))) + D x`.
        method: `recurrence` or `dense`.

    Returns:
        `y (b, l, h, p)`, the state after the last token of the forward direction, and the one after the first token
        of the backward direction (None in the causal form), `(b, h, p, n)` each. All in the widest input dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if seq_idx is not None:
        seq_idx = seq_idx.long()

    def one(direction: Direction, state: Tensor | None, turn):
        delta = step_size(direction.dt, direction.dt_bias, dt_softplus, dt_limit, dtype)
        heads = x.shape[2] // direction.B.shape[2]
        B, C = (t.to(dtype).repeat_interleave(heads, dim=2) for t in (direction.B, direction.C))
        idx = turn(seq_idx)
        state = None if state is None else state.to(dtype)
        y, final = method(turn(x.to(dtype)), turn(delta), direction.A.to(dtype), turn(B), turn(C), idx, state)
        return turn(shift_down(y, idx) if shift else y), final

    y, final_forward = one(forward, initial_states[0], lambda t: t)
    final_backward = None
    if backward is not None:
        y_backward, final_backward = one(backward, initial_states[1], flip)
        y = y + y_backward
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(dtype) * x.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y, final_forward, final_backward
