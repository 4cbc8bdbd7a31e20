"""A Mamba-2 block as one autograd node on the kernels: convolution, scan and gated norm and, where all of it is
recomputed in the backward pass, both projections. The gradients of the input projection's parts are written where they
belong, so that nothing is cut or joined, and the host walks through one node instead of a dozen.

Bi-Mamba2 takes `use_mem_eff_path` and ignores it; Mamba-2's causal form of this node is Dao and Gu (2024,
arXiv:2405.21060), section 8.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv1d.binding import kernel_flags
from .conv1d.kernels import Form as ConvForm
from .conv1d.kernels import conv_backward, conv_forward
from .conv1d.reference import taps_before
from .entrance import below_autograd, differentiable, enter, implement, once
from .gated_norm.kernels import norm_backward, norm_forward
from .launch import once_a_form
from .prepare import Prepared, prepare
from .ssd.binding import states_fit
from .ssd.kernels.choose import Problem, layout, problem_of
from .ssd.kernels.scan import Inputs, Saved, scan_backward, scan_forward
from .totals import Total, totals


class Form(NamedTuple):
    """What is not a tensor."""

    headdim: int
    d_state: int
    ngroups: int
    bidirectional: bool
    tied: bool
    shift: bool
    activate: bool
    least: float  # the step size's limits
    largest: float
    eps: float
    norm_before_gate: bool
    group_size: int
    allow_tf32: bool
    keep: bool = False  # what the backward pass needs, instead of recomputing it
    save: bool = False  # and the states, too


class Parameters(NamedTuple):
    """Tensors, in the order in which the node takes them and returns their gradients."""

    conv_weight: Tensor  # (d_xBC, 1, width)
    conv_bias: Tensor | None  # (d_xBC)
    dt_bias: Tensor  # (h), or (2 h) untied: forward, backward
    A_log: Tensor  # likewise: A = -exp(A_log)
    D: Tensor  # (h)
    norm_weight: Tensor  # (d_inner)
    in_weight: Tensor | None = None  # (columns, d_model), in the dtype to compute in; None: no projections
    in_bias: Tensor | None = None
    out_weight: Tensor | None = None  # (d_model, d_inner), likewise
    out_bias: Tensor | None = None


def mixer(source: Tensor, mask: Tensor | None, seq_idx: Tensor | None, parameters: Parameters, form: Form) -> Tensor:
    """The gated norm's output `(b, l, d_inner)` or, with the projections' weights, `(b, l, d_model)` behind both.

    Args:
        source: in the dtype to compute in, the input projection `(b, l, z | x | B, C [| B, C backward] | dt | ...)`,
            of which columns behind dt are not read, or, with the projections' weights, its input `(b, l, d_model)`.
        mask: `(b, l)` bool. seq_idx: `(b, l)` ints.
        parameters: with the projections' weights nothing but `source` is kept for the backward pass.
        form: `keep` and `save` are decided here.
    """
    source = source.contiguous()
    seq_idx = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    tensors = (source, *parameters)
    keep = parameters.in_weight is None and torch.is_grad_enabled()
    keep = keep and any([t.requires_grad for t in tensors if t is not None])
    heads, shape = parameters.D.shape[0], source.shape
    save = keep and states_fit(*shape[:2], heads, form.headdim, form.d_state, form.bidirectional, source.dtype)
    form = form._replace(keep=keep, save=save)
    return enter(torch.ops.bimamba.mixer.default, _Mixer, _forward, source, mask, seq_idx, *parameters, *form)[0]


_library = torch.library.Library("bimamba", "FRAGMENT")
_TENSORS = (
    "Tensor source, Tensor? mask, Tensor? seq_idx, Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, "
    "Tensor A_log, Tensor D, Tensor norm_weight, Tensor? in_weight, Tensor? in_bias, Tensor? out_weight, "
    "Tensor? out_bias"
)
_FORM = (
    "int headdim, int d_state, int ngroups, bool bidirectional, bool tied, bool shift, bool activate, float least, "
    "float largest, float eps, bool norm_before_gate, int group_size, bool allow_tf32, bool keep, bool save"
)
_COUNT = len(Parameters._fields)
_PARAMETERS = slice(3, 3 + _COUNT)  # of the operators' arguments
# The output and, if keep, A, the convolution's weight by taps, the convolution's parts, y and (empty unless save) the
# states and their rows
_library.define(f"mixer({_TENSORS}, {_FORM}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
# The gradients of source and of the parameters that are there, in their order
_library.define(
    f"mixer_backward(Tensor dout, {_TENSORS}, Tensor[] kept, {_FORM}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)


def _forward(source, mask, seq_idx, *rest):
    p, form = Parameters(*rest[:_COUNT]), Form(*rest[_COUNT:])
    projected = _projected(source, p)
    plan = _plan_of(projected, p, form, mask is not None, seq_idx is not None)
    z, xBC, dt, _ = projected.split_with_sizes(plan.widths, -1)
    flags = kernel_flags(mask, seq_idx)
    exact = prepare(p.A_log, p.conv_weight)
    parts = _convolved(plan, xBC, exact, p, flags)
    inputs = _inputs(plan, dt, parts, exact, p, flags)
    y, _, saved = scan_forward(plan.problem, inputs, save=form.save, keep_ungated=False, final=False)
    out = z.new_empty(z.shape)
    norm_forward(y, z, p.norm_weight, *plan.norm, out)
    if p.out_weight is not None:
        out = _linear(out, p.out_weight, p.out_bias)
    if not form.keep:
        return [out]
    return [out, *exact, *parts, y, *(y.new_empty(0) if t is None else t for t in saved[:2])]


def _backward(dout, source, mask, seq_idx, *rest):
    p, kept, form = Parameters(*rest[:_COUNT]), rest[_COUNT], Form(*rest[_COUNT + 1 :])
    projected = _projected(source, p)
    plan = _plan_of(projected, p, form, mask is not None, seq_idx is not None)
    z, xBC, dt, _ = projected.split_with_sizes(plan.widths, -1)
    flags = kernel_flags(mask, seq_idx)
    if form.keep:
        A, taps, *parts, y, states, rows = kept
        exact = Prepared(A, taps)
        inputs = _inputs(plan, dt, parts, exact, p, flags)
        saved = Saved(states, rows, None) if form.save else Saved(None, None, None)
    else:
        exact = prepare(p.A_log, p.conv_weight)
        inputs = _inputs(plan, dt, _convolved(plan, xBC, exact, p, flags), exact, p, flags)
        y, _, saved = scan_forward(plan.problem, inputs, save=True, keep_ungated=False, final=False)
    dprojected = torch.empty_like(projected)
    dz, dxBC, ddt, unread = dprojected.split_with_sizes(plan.widths, -1)
    if plan.widths[-1]:
        unread.zero_()
    # In the parameters' layout, each in memory of its own, as an operator's outputs must be
    empty = p._replace(in_weight=None, out_weight=None)
    grads = Parameters(*[t if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in empty])

    dout = dout.to(projected.dtype).contiguous()
    dnormed = dout if p.out_weight is None else _rows(dout) @ p.out_weight
    again = p.out_weight is not None
    dy, norm_parts, normed = norm_backward(dnormed, y, z, p.norm_weight, *plan.norm, dz=dz, again=again)
    if normed is not None:
        grads = grads._replace(out_weight=_rows(dout).t() @ normed.view(-1, p.norm_weight.shape[0]))
    if p.out_bias is not None:
        grads.out_bias.copy_(_rows(dout).sum(0, dtype=torch.float32))
    del normed, dnormed
    of_scan = scan_backward(plan.problem, inputs, saved, dy, None, _by_direction(plan, ddt))
    dparts = [t for pair in zip(of_scan.B, of_scan.C, strict=True) for t in pair if t is not None]
    conv_parts = conv_backward(plan.conv, [of_scan.x, *dparts], xBC, exact.taps, p.conv_bias, *flags, dxBC)
    totals(
        Total(of_scan.heads, grads.A_log, grads.dt_bias, factor=exact.A),
        Total(of_scan.D, grads.D),
        Total(conv_parts, grads.conv_weight, grads.conv_bias, taps=plan.conv.width),
        Total(norm_parts, grads.norm_weight),
    )
    dsource = dprojected
    if p.in_weight is not None:
        rows = _rows(dprojected)
        dsource = (rows @ p.in_weight).view(source.shape)
        grads = grads._replace(in_weight=rows.t() @ _rows(source))
        if p.in_bias is not None:
            grads.in_bias.copy_(rows.sum(0, dtype=torch.float32))
    return [dsource, *[t for t in grads if t is not None]]


def _projected(source: Tensor, p: Parameters) -> Tensor:
    return source if p.in_weight is None else _linear(source, p.in_weight, p.in_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


class _Plan(NamedTuple):
    """What follows from the form and the sizes, the same in every call."""

    problem: Problem
    conv: ConvForm
    norm: tuple[float, bool, int]
    widths: list[int]  # of the projection's parts
    parts: list[tuple[int, ...]]  # shapes of x, B, C and, untied, B and C of the backward direction


def _plan(
    form: Form,
    shape: tuple[int, ...],  # of the projection
    dtype: torch.dtype,
    device: torch.device,
    heads: int,
    widths: tuple[int, ...],  # of the projection's parts that are read
    taps: int,
    bias: bool,
    mask: bool,
    seq: bool,
    make=problem_of,
) -> _Plan:
    """`make`: `Problem` where sizes may be symbolic."""
    b, l, columns = shape
    h, g, p, n = heads, form.ngroups, form.headdim, form.d_state
    flags = (form.bidirectional, not form.tied, form.shift, True, (form.least, form.largest), form.allow_tf32)
    problem = make(b, l, h, g, p, n, dtype, device, *flags)
    split = (h * p, *[g * n] * (2 if form.tied else 4))
    left = taps_before(taps, causal=not form.bidirectional)
    return _Plan(
        problem=problem,
        conv=ConvForm(split, taps, left, form.activate, bias, mask, seq),
        norm=(form.eps, form.norm_before_gate, form.group_size),
        widths=[*widths, columns - sum(widths)],
        parts=[(b, l, h, p), *[(b, l, g, n)] * (len(split) - 1)],
    )


_kept_plan = once_a_form(_plan)


def _plan_of(projected: Tensor, p: Parameters, form: Form, mask: bool, seq: bool, make=_kept_plan) -> _Plan:
    conv = p.conv_weight.shape
    widths = (p.norm_weight.shape[0], conv[0], p.dt_bias.shape[0])
    given = (projected.shape, projected.dtype, projected.device, p.D.shape[0], widths, conv[2])
    return make(form, *given, p.conv_bias is not None, mask, seq)


def _convolved(plan: _Plan, xBC: Tensor, exact: Prepared, p: Parameters, flags: tuple) -> list[Tensor]:
    """x, B, C and, untied, B and C of the backward direction."""
    parts = [xBC.new_empty(shape) for shape in plan.parts]
    conv_forward(plan.conv, xBC, exact.taps, p.conv_bias, *flags, parts)
    return parts


def _inputs(plan: _Plan, dt: Tensor, parts: list[Tensor], exact: Prepared, p: Parameters, flags: tuple) -> Inputs:
    x, B, C, *back = parts
    mask, seq_idx = flags
    pairs = [_by_direction(plan, t) for t in (dt, exact.A, p.dt_bias.float())]
    dt_pair, A_pair, bias_pair = pairs
    B_back, C_back = back or (B, C)
    return Inputs(
        x, dt_pair, A_pair, (B, B_back), (C, C_back), bias_pair, p.D.float(), None, seq_idx, (None, None), mask
    )


def _by_direction(plan: _Plan, t: Tensor) -> tuple[Tensor, Tensor]:
    """`(..., h)` twice or, untied, the halves of `(..., 2 h)`."""
    return t.chunk(2, dim=-1) if plan.problem.untied else (t, t)


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, 1)


def _forward_fake(source, mask, seq_idx, *rest):
    p, form = Parameters(*rest[:_COUNT]), Form(*rest[_COUNT:])
    columns = p.norm_weight.shape[0] if p.out_weight is None else p.out_weight.shape[0]
    out = source.new_empty((*source.shape[:2], columns))
    if not form.keep:
        return [out]
    plan = _plan_of(source, p, form, mask is not None, seq_idx is not None, functools.partial(_plan, make=Problem))
    problem = plan.problem
    saved = layout(problem, saved=form.save)
    weight = p.conv_weight.new_empty(p.conv_weight.shape[::2][::-1])
    shapes = [*plan.parts, plan.parts[0]]
    return [
        out,
        torch.empty_like(p.A_log, dtype=torch.float32),
        weight,
        *(source.new_empty(shape) for shape in shapes),
        source.new_empty(problem.states_shape(saved) if form.save else 0),
        source.new_empty(problem.rows_shape(saved), dtype=torch.float32) if form.save else source.new_empty(0),
    ]


def _backward_fake(dout, source, mask, seq_idx, *rest):
    tensors = (source, *rest[:_COUNT])
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors if t is not None]


implement(_library, "mixer", _forward, _forward_fake)
implement(_library, "mixer_backward", _backward, _backward_fake)


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return tuple(below_autograd(torch.ops.bimamba.mixer.default, _forward, *args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form = inputs[_PARAMETERS.stop :]
        ctx.save_for_backward(*inputs[: _PARAMETERS.stop], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, *_):
        saved = ctx.saved_tensors  # once: checkpointing unpacks anew at every look
        tensors, kept = saved[: _PARAMETERS.stop], list(saved[_PARAMETERS.stop :])
        args = (dout, *tensors, kept, *ctx.form)
        dsource, *rest = below_autograd(torch.ops.bimamba.mixer_backward.default, _backward, *args)
        grads = iter(rest)
        of_parameters = [None if t is None else next(grads) for t in tensors[_PARAMETERS]]
        found = once((dsource, None, None, *of_parameters), (dout, *tensors))
        return *found, *([None] * len(ctx.form))


differentiable(_library, torch.ops.bimamba.mixer.default, _Mixer)
