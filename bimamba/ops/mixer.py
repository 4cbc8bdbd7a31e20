"""What follows a Mamba-2 block's input projection as one autograd node on the kernels: convolution, scan and gated
norm and, where all of it is recomputed in the backward pass, the output projection. The gradients of the projection's
parts are written where they belong, so that nothing is cut or joined, and the host walks through one node instead of a
dozen.

Bi-Mamba2 takes `use_mem_eff_path` and ignores it; Mamba-2's causal form of this node is Dao and Gu (2024,
arXiv:2405.21060), section 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv1d.binding import kernel_flags
from .conv1d.kernels import by_taps, conv_backward, conv_forward, form_of
from .conv1d.reference import taps_before
from .entrance import below_autograd, differentiable, enter, implement
from .gated_norm.kernels import norm_backward, norm_forward
from .ssd.binding import states_fit
from .ssd.kernels.choose import Problem, layout, problem_of
from .ssd.kernels.scan import Inputs, Saved, scan_backward, scan_forward


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
    out_weight: Tensor | None = None  # (d_model, d_inner); None: no output projection
    out_bias: Tensor | None = None


def mixer(projected: Tensor, mask: Tensor | None, seq_idx: Tensor | None, parameters: Parameters, form: Form) -> Tensor:
    """The gated norm's output `(b, l, d_inner)` or, with `out_weight`, `(b, l, d_model)` behind the output projection.

    Args:
        projected: the input projection `(b, l, z | x | B, C [| B, C backward] | dt | ...)` in the dtype to compute in;
            columns behind dt are not read.
        mask: `(b, l)` bool. seq_idx: `(b, l)` ints.
        parameters: with `out_weight` nothing but `projected` is kept for the backward pass.
        form: `keep` and `save` are decided here.
    """
    projected = projected.contiguous()
    seq_idx = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    tensors = (projected, *parameters)
    keep = parameters.out_weight is None and torch.is_grad_enabled()
    keep = keep and any([t.requires_grad for t in tensors if t is not None])
    heads, shape = parameters.D.shape[0], projected.shape
    save = keep and states_fit(*shape[:2], heads, form.headdim, form.d_state, form.bidirectional, projected.dtype)
    form = form._replace(keep=keep, save=save)
    return enter(torch.ops.bimamba.mixer.default, _Mixer, _forward, projected, mask, seq_idx, *parameters, *form)[0]


_library = torch.library.Library("bimamba", "FRAGMENT")
_TENSORS = (
    "Tensor projected, Tensor? mask, Tensor? seq_idx, Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, "
    "Tensor A_log, Tensor D, Tensor norm_weight, Tensor? out_weight, Tensor? out_bias"
)
_FORM = (
    "int headdim, int d_state, int ngroups, bool bidirectional, bool tied, bool shift, bool activate, float least, "
    "float largest, float eps, bool norm_before_gate, int group_size, bool allow_tf32, bool keep, bool save"
)
_COUNT = len(Parameters._fields)
_PARAMETERS = slice(3, 3 + _COUNT)  # of the operators' arguments
# The output and, if keep, A, the convolution's weight by taps, dt, the convolution's parts, y and (empty unless save)
# the states and their rows
_library.define(f"mixer({_TENSORS}, {_FORM}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
# The gradients of projected and of the parameters that are there, in their order
_library.define(
    f"mixer_backward(Tensor dout, {_TENSORS}, Tensor[] kept, {_FORM}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)


def _forward(projected, mask, seq_idx, *rest):
    p, form = Parameters(*rest[:_COUNT]), Form(*rest[_COUNT:])
    z, xBC, dt, _ = projected.split(_widths(projected, p), dim=-1)
    exact = _exact(p)
    kept = _convolved(xBC, dt, mask, seq_idx, exact, p, form)
    problem = _problem(projected, p, form)
    inputs = _inputs(problem, kept, seq_idx, exact, p)
    y, _, saved = scan_forward(problem, inputs, save=form.save, keep_ungated=False, final=False)
    y = y.view(z.shape)
    out = norm_forward(_rows(y), _rows(z), p.norm_weight, *_norm_form(form))
    if p.out_weight is not None:
        bias = None if p.out_bias is None else p.out_bias.to(out.dtype)
        with torch.autocast(projected.device.type, enabled=False):
            out = F.linear(out, p.out_weight.to(out.dtype), bias)
    out = out.view(*projected.shape[:2], -1)
    if not form.keep:
        return [out]
    return [out, *exact, *kept, y, *(y.new_empty(0) if t is None else t for t in saved[:2])]


def _backward(dout, projected, mask, seq_idx, *rest):
    p, kept, form = Parameters(*rest[:_COUNT]), rest[_COUNT], Form(*rest[_COUNT + 1 :])
    z, xBC, dt, _ = projected.split(_widths(projected, p), dim=-1)
    problem = _problem(projected, p, form)
    if form.keep:
        A, weight, *kept, y, states, rows = kept
        exact = _Exact(A, weight)
        saved = Saved(*(t if form.save else None for t in (states, rows)), None)
        inputs = _inputs(problem, kept, seq_idx, exact, p)
    else:
        exact = _exact(p)
        inputs = _inputs(problem, _convolved(xBC, dt, mask, seq_idx, exact, p, form), seq_idx, exact, p)
        y, _, saved = scan_forward(problem, inputs, save=True, keep_ungated=False, final=False)
    dprojected = torch.empty_like(projected)
    dz, dxBC, ddt, unread = dprojected.split(_widths(projected, p), dim=-1)
    if unread.shape[-1]:
        unread.zero_()

    dout = _rows(dout.to(projected.dtype).contiguous())
    dnormed = dout if p.out_weight is None else dout @ p.out_weight.to(dout.dtype)
    dy, dnorm_weights, normed = norm_backward(
        dnormed,
        _rows(y.view(z.shape)),
        _rows(z),
        p.norm_weight,
        *_norm_form(form),
        dz=_rows(dz),
        again=p.out_weight is not None,
    )
    dout_weight = None if normed is None else dout.t() @ normed
    del normed, dnormed
    grads = scan_backward(problem, inputs, saved, dy.view(inputs.x.shape), None)
    dt_grad = _joined(grads.dt, dim=-1)
    ddt.copy_(dt_grad if mask is None else dt_grad.masked_fill_(~mask[..., None], 0.0))
    dparts = [t for t in (grads.x, grads.B[0], grads.C[0], grads.B[1], grads.C[1]) if t is not None]
    flags = kernel_flags(mask, seq_idx)
    dconv = conv_backward(_conv_form(exact, form, p, flags), dparts, xBC, exact.conv_weight, p.conv_bias, *flags, dxBC)
    dconv = dconv.sum(0)
    gradients = Parameters(
        conv_weight=dconv[:-1].t()[:, None],
        conv_bias=None if p.conv_bias is None else dconv[-1],
        dt_bias=_joined(grads.bias),
        A_log=_joined(grads.A).mul_(exact.A),
        D=grads.D,
        norm_weight=dnorm_weights.sum(0),
        out_weight=dout_weight,
        out_bias=None if p.out_bias is None else dout.sum(0, dtype=torch.float32),
    )
    # In the parameters' layout, each in memory of its own, as an operator's outputs must be
    cast = [
        torch.empty_like(t, memory_format=torch.contiguous_format).copy_(g)
        if g.dtype != t.dtype or g._base is not None
        else g
        for g, t in zip(gradients, p, strict=True)
        if t is not None
    ]
    return [dprojected, *cast]


def _problem(projected: Tensor, p: Parameters, form: Form, make=problem_of) -> Problem:
    """`make`: `Problem` where sizes may be symbolic."""
    return make(
        *projected.shape[:2],
        p.D.shape[0],
        form.ngroups,
        form.headdim,
        form.d_state,
        projected.dtype,
        projected.device,
        form.bidirectional,
        not form.tied,
        form.shift,
        True,
        (form.least, form.largest),
        form.allow_tf32,
    )


class _Exact(NamedTuple):
    """What both passes read instead of a parameter."""

    A: Tensor  # fp32
    conv_weight: Tensor  # (width, d_xBC)


def _exact(p: Parameters) -> _Exact:
    return _Exact(p.A_log.float().exp().neg_(), by_taps(p.conv_weight[:, 0]))


def _convolved(xBC: Tensor, dt: Tensor, mask, seq_idx, exact: _Exact, p: Parameters, form: Form) -> list[Tensor]:
    """dt, x, B, C and, untied, B and C of the backward direction, contiguous."""
    flags = kernel_flags(mask, seq_idx)
    parts = [xBC.new_empty((*xBC.shape[:2], size)) for size in _sizes(p, form)]
    conv_forward(_conv_form(exact, form, p, flags), xBC, exact.conv_weight, p.conv_bias, *flags, parts)
    # softplus(-1e4) is exactly 0: padding neither decays nor adds
    dt = dt.clone(memory_format=torch.contiguous_format) if mask is None else dt.masked_fill(~mask[..., None], -1e4)
    return [dt, *parts]


def _inputs(problem: Problem, kept: list[Tensor], seq_idx: Tensor | None, exact: _Exact, p: Parameters) -> Inputs:
    dt, x, *matrices = kept
    b, l, h, g, n = problem.b, problem.l, problem.h, problem.g, problem.n
    B, C, *back = (t.view(b, l, g, n) for t in matrices)
    A, bias = exact.A, p.dt_bias.float()
    if problem.untied:
        halves = [tuple(t.contiguous() for t in v.chunk(2, dim=-1)) for v in (dt, A, bias)]
        pairs = [halves[0], halves[1], (B, back[0]), (C, back[1]), halves[2]]
    else:
        pairs = [(t, t) for t in (dt, A, B, C, bias)]
    return Inputs(x.view(b, l, h, problem.p), *pairs, D=p.D.float(), z=None, seq_idx=seq_idx, initial=(None, None))


def _sizes(p: Parameters, form: Form) -> list[int]:
    return [p.D.shape[0] * form.headdim, *[form.ngroups * form.d_state] * (2 if form.tied else 4)]


def _widths(projected: Tensor, p: Parameters) -> list[int]:
    sizes = [p.norm_weight.shape[0], p.conv_weight.shape[0], p.dt_bias.shape[0]]
    return [*sizes, projected.shape[-1] - sum(sizes)]


def _conv_form(exact: _Exact, form: Form, p: Parameters, flags: tuple):
    left = taps_before(p.conv_weight.shape[2], causal=not form.bidirectional)
    return form_of(exact.conv_weight, p.conv_bias, form.activate, left, *flags, _sizes(p, form))


def _norm_form(form: Form) -> tuple:
    return form.eps, form.norm_before_gate, form.group_size


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, 1)


def _joined(pair: tuple[Tensor, Tensor | None], dim: int = 0) -> Tensor:
    return pair[0] if pair[1] is None else torch.cat(pair, dim)


def _forward_fake(projected, mask, seq_idx, *rest):
    p, form = Parameters(*rest[:_COUNT]), Form(*rest[_COUNT:])
    rows = projected.shape[:2]
    columns = p.norm_weight.shape[0] if p.out_weight is None else p.out_weight.shape[0]
    out = projected.new_empty((*rows, columns))
    if not form.keep:
        return [out]
    problem = _problem(projected, p, form, make=Problem)
    saved = layout(problem, saved=form.save)
    weight = p.conv_weight.new_empty(p.conv_weight.shape[::2][::-1])
    shapes = [(*rows, size) for size in (p.dt_bias.shape[0], *_sizes(p, form), p.norm_weight.shape[0])]
    return [
        out,
        torch.empty_like(p.A_log, dtype=torch.float32),
        weight,
        *(projected.new_empty(shape) for shape in shapes),
        projected.new_empty(problem.states_shape(saved) if form.save else 0),
        projected.new_empty(problem.rows_shape(saved), dtype=torch.float32) if form.save else projected.new_empty(0),
    ]


def _backward_fake(dout, projected, mask, seq_idx, *rest):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (projected, *rest[:_COUNT]) if t is not None
    ]


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
        dprojected, *rest = below_autograd(torch.ops.bimamba.mixer_backward.default, _backward, *args)
        grads = iter(rest)
        of_parameters = [None if t is None else next(grads) for t in tensors[_PARAMETERS]]
        return dprojected, None, None, *of_parameters, *([None] * len(ctx.form))


differentiable(_library, torch.ops.bimamba.mixer.default, _Mixer)
