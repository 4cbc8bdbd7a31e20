"""The Triton scan as PyTorch operators: `bimamba::scan` and `bimamba::scan_backward`, their fakes, and autograd.

No mathematics here: `kernels/scan.py` holds the passes. Arguments are valid when they arrive (`api.py` checks them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..entrance import below_autograd, differentiable, enter, implement, once
from ..totals import Total, totals
from .kernels.choose import Problem, layout, problem_of
from .kernels.scan import Gradients, Inputs, Saved, scan_backward, scan_forward

INF = float("inf")

# Saved states cost as many bytes as x at p = n = 64, recomputing them 10-20 % of a step: beyond this size memory counts
SAVE_STATES_BYTES = 2**30


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_back: Tensor | None = None,
    A_back: Tensor | None = None,
    B_back: Tensor | None = None,
    C_back: Tensor | None = None,
    dt_bias_back: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    seq_idx: Tensor | None = None,
    initial_states: tuple[Tensor | None, Tensor | None] = (None, None),
    return_final_states: bool = False,
    bidirectional: bool = True,
    shift: bool = False,
    save_states: bool | None = None,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(y, final_forward, final_backward)` of the scan of DESIGN section 3; see `api.bimamba_chunk_scan_combined`.

    x, z `(b, l, h, p)`; dt `(b, l, h)`; A, dt_bias `(h)`; B, C `(b, l, g, n)`; D `(h)` or `(h, p)`; seq_idx `(b, l)`;
    states `(b, h, p, n)`. `y` in the dtype of x, final states fp32, None unless asked for. A direction has parameters
    of its own where all of `*_back` are given.
    """
    # Contiguous once, here, where autograd sees it: what is saved for the backward pass is then the copy
    x, B, C, z = (_contiguous(t, x.dtype) for t in (x, B, C, z))
    B_back, C_back = (_contiguous(t, x.dtype) for t in (B_back, C_back))
    dt, dt_back = (_contiguous(t, _dt_dtype(t)) for t in (dt, dt_back))
    seq_idx = _contiguous(seq_idx, torch.int32)
    state = initial_states[0] if initial_states[0] is not None else initial_states[1]
    if state is not None and bidirectional:
        initial_states = tuple(torch.zeros_like(state) if t is None else t for t in initial_states)
    tensors = (x, dt, A, B, C, dt_back, A_back, B_back, C_back, dt_bias, dt_bias_back, D, z, seq_idx, *initial_states)
    train = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if save_states is None:
        save_states = states_fit(*x.shape, B.shape[-1], bidirectional, x.dtype)
    least, largest = dt_limit
    y, ends, *_ = enter(
        torch.ops.bimamba.scan.default,
        _Scan,
        _scan,
        *tensors,
        dt_softplus,
        float(least),
        float(largest),
        bidirectional,
        shift,
        return_final_states,
        train,
        train and save_states,
        allow_tf32,
    )
    if not return_final_states:
        return y, None, None
    return y, ends[0], ends[1] if bidirectional else None


def _contiguous(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if t is None or (t.dtype == dtype and t.is_contiguous()):
        return t
    return t.to(dtype).contiguous()


def _dt_dtype(dt: Tensor | None) -> torch.dtype:
    return torch.float32 if dt is None or dt.dtype == torch.float64 else dt.dtype


def states_fit(b: int, l: int, h: int, p: int, n: int, bidirectional: bool, dtype: torch.dtype) -> bool:
    """Whether the backward pass takes over the states by default, or computes them again. About: at a chunk of 128."""
    states = b * (l // 128 + 1) * h * (2 if bidirectional else 1) * p * n
    return states * dtype.itemsize <= SAVE_STATES_BYTES


# ---------------------------------------------------------------------------------------------------- operators

ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? dt_back, Tensor? A_back, Tensor? B_back, "
    "Tensor? C_back, Tensor? dt_bias, Tensor? dt_bias_back, Tensor? D, Tensor? z, Tensor? seq_idx, "
    "Tensor? initial_forward, Tensor? initial_backward, "
    "bool dt_softplus, float least, float largest, bool bidirectional, bool shift"
)
TENSORS = 16  # of ARGUMENTS come first
SEQ_IDX = 13  # the one among them without a gradient

_library = torch.library.Library("bimamba", "DEF")
# `ends` (directions, b, h, p, n) if final; `states`, `rows` if save; `ungated` if train and z: empty where not asked
# for
_library.define(
    f"scan({ARGUMENTS}, bool final, bool train, bool save, bool allow_tf32)"
    " -> (Tensor y, Tensor ends, Tensor states, Tensor rows, Tensor ungated)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The gradients of the tensors that are there, in their order, without seq_idx
_library.define(
    f"scan_backward(Tensor dy, Tensor? dends, {ARGUMENTS}, Tensor states, Tensor rows, Tensor ungated, bool allow_tf32)"
    " -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _problem(make, x, dt, A, B, C, dt_back, *rest, allow_tf32: bool) -> Problem:
    """`make`: `problem_of`, or `Problem` where sizes may be symbolic."""
    softplus, least, largest, bidirectional, shift = rest[TENSORS - 6 :]
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    untied = dt_back is not None
    return make(
        b, l, h, g, p, n, x.dtype, x.device, bidirectional, untied, shift, softplus, (least, largest), allow_tf32
    )


def _inputs(x, dt, A, B, C, dt_back, A_back, B_back, C_back, bias, bias_back, D, z, seq_idx, first, last, *_) -> Inputs:
    def exact(t):
        return t if t is None else _whole(_cast(t, torch.float32))

    x, dt, B, C, z, seq_idx = (_whole(t) for t in (x, dt, B, C, z, seq_idx))
    A, bias, D, first, last = (exact(t) for t in (A, bias, D, first, last))
    untied = dt_back is not None
    return Inputs(
        x=x,
        dt=(dt, _whole(dt_back) if untied else dt),
        A=(A, exact(A_back) if untied else A),
        B=(B, _whole(B_back) if untied else B),
        C=(C, _whole(C_back) if untied else C),
        bias=(bias, exact(bias_back) if untied else bias),
        D=D,
        z=z,
        seq_idx=seq_idx,
        initial=(first, last),
    )


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, which asks the dispatcher first: there are a dozen in a step of the scan."""
    return t if t.dtype is dtype else t.to(dtype)


def _whole(t: Tensor | None) -> Tensor | None:
    """Contiguous, at an address that tensor descriptors take."""
    if t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _scan(*args):
    *arguments, final, train, save, allow_tf32 = args
    problem = _problem(problem_of, *arguments, allow_tf32=allow_tf32)
    t = _inputs(*arguments)
    y, ends, saved = scan_forward(problem, t, save=save, keep_ungated=train, final=final)
    return y, *(y.new_empty(0) if out is None else out for out in (ends, *saved))


def _scan_fake(*args):
    *arguments, final, train, save, allow_tf32 = args
    problem = _problem(Problem, *arguments, allow_tf32=allow_tf32)
    saved = layout(problem, saved=save)
    x, z = arguments[0], arguments[12]
    y = x.new_empty(x.shape)

    def out(present, shape, dtype=torch.float32):
        return x.new_empty(shape, dtype=dtype) if present else x.new_empty(0)

    return (
        y,
        out(final, (problem.directions, problem.b, problem.h, problem.p, problem.n)),
        out(save, problem.states_shape(saved), x.dtype),
        out(save, problem.rows_shape(saved)),
        out(train and z is not None, x.shape, x.dtype),
    )


def _scan_backward(dy, dends, *args):
    *arguments, states, rows, ungated, allow_tf32 = args
    problem = _problem(problem_of, *arguments, allow_tf32=allow_tf32)
    saved = Saved(*(t if t.numel() else None for t in (states, rows, ungated)))
    dends = None if dends is None else dends.to(torch.float32).contiguous()
    inputs = _inputs(*arguments)
    ddt = tuple(torch.empty_like(t) for t in inputs.dt[: problem.sets])
    grads = scan_backward(problem, inputs, saved, _whole(dy), dends, ddt)
    dA, dbias, dD = _totals(grads, inputs)
    # An operator's outputs must not share memory, as two halves of one buffer would
    if problem.untied:
        (dA, dA_back), (dbias, dbias_back) = ([half.clone() for half in t.chunk(2)] for t in (dA, dbias))
    else:
        dA_back = dbias_back = None
    initial = (None, None) if grads.initial is None else (grads.initial[0].clone(), grads.initial[-1].clone())
    (dB, dB_back), (dC, dC_back) = grads.B, grads.C
    back = (ddt[-1], dA_back, dB_back, dC_back)
    ordered = (grads.x, ddt[0], dA, dB, dC, *back, dbias, dbias_back, dD, grads.z, None, *initial)
    present = zip(arguments[:TENSORS], ordered, strict=True)
    return [_cast(grad, t.dtype) for i, (t, grad) in enumerate(present) if t is not None and i != SEQ_IDX]


def _totals(grads: Gradients, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """dA and d(dt_bias) `(sets * h)` and dD, fp32."""
    dA, dbias = (grads.heads.new_empty(grads.heads.shape[-1]) for _ in range(2))
    parts = [Total(grads.heads, dA, dbias)]
    dD = None
    if grads.D is not None:
        dD = torch.empty_like(inputs.D)
        parts.append(Total(grads.D, dD))
    totals(*parts)
    return dA, dbias, dD


def _scan_backward_fake(dy, dends, *args):
    return [t.new_empty(t.shape) for i, t in enumerate(args[:TENSORS]) if t is not None and i != SEQ_IDX]


implement(_library, "scan", _scan, _scan_fake)
implement(_library, "scan_backward", _scan_backward, _scan_backward_fake)


class _Scan(torch.autograd.Function):
    """Autograd of `bimamba::scan`."""

    @staticmethod
    def forward(*args):
        return below_autograd(torch.ops.bimamba.scan.default, _scan, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *arguments, _, _, _, allow_tf32 = inputs
        _, _, states, rows, ungated = output
        ctx.save_for_backward(*arguments[:TENSORS], states, rows, ungated)
        ctx.flags = arguments[TENSORS:]
        ctx.allow_tf32 = allow_tf32
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(states, rows, ungated)

    @staticmethod
    def backward(ctx, dy, dends, *_):
        saved = ctx.saved_tensors
        arguments = saved[:TENSORS]
        if dy is None:
            dy = torch.zeros_like(arguments[0])
        operator = torch.ops.bimamba.scan_backward.default
        args = (dy, dends, *arguments, *ctx.flags, *saved[TENSORS:], ctx.allow_tf32)
        grads = iter(below_autograd(operator, _scan_backward, *args))
        of_tensors = [next(grads) if t is not None and i != SEQ_IDX else None for i, t in enumerate(arguments)]
        return *once(of_tensors, (dy, dends, *arguments)), *([None] * (len(ctx.flags) + 4))


differentiable(_library, torch.ops.bimamba.scan.default, _Scan)
