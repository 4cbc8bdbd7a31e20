"""Everything behind a Mamba-2 block's input projection as one autograd node on the kernels: convolution, scan, gated
norm and output projection. It keeps the projection for the backward pass and recomputes the rest, and the gradients of
the projection's parts are written where they belong, so that nothing is cut or joined.

Bi-Mamba2 takes `use_mem_eff_path` and ignores it; Mamba-2's causal form of this node is Dao and Gu (2024,
arXiv:2405.21060), section 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .conv1d.binding import kernel_flags
from .conv1d.kernels import conv_backward, conv_forward
from .conv1d.reference import taps_before
from .gated_norm.kernels import norm_backward, norm_forward
from .ssd.kernels.choose import Problem
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
    dt_limit: tuple[float, float]
    eps: float
    norm_before_gate: bool
    group_size: int | None
    allow_tf32: bool


class Parameters(NamedTuple):
    """Tensors, in the order in which the node takes them and returns their gradients."""

    conv_weight: Tensor  # (d_xBC, width)
    conv_bias: Tensor | None  # (d_xBC)
    dt_bias: Tensor  # (h), or (2 h) untied: forward, backward
    A: Tensor  # likewise, negative
    D: Tensor  # (h)
    norm_weight: Tensor  # (d_inner)
    out_weight: Tensor  # (d_model, d_inner)
    out_bias: Tensor | None


def mixer(projected: Tensor, mask: Tensor | None, seq_idx: Tensor | None, parameters: Parameters, form: Form) -> Tensor:
    """`(b, l, d_model)` of the input projection `(b, l, z | x | B, C [| B, C backward] | dt | ...)`, on the kernels'
    device; columns behind dt are not read.

    Args:
        projected: contiguous, the dtype to compute in. mask: `(b, l)` bool. seq_idx: `(b, l)` ints.
    """
    seq_idx = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    return _Mixer.apply(projected.contiguous(), mask, seq_idx, form, *parameters)


class _Step(NamedTuple):
    """What forward and backward pass compute alike."""

    parts: list[Tensor]  # x, B, C[, B, C]
    xBC: Tensor
    z: Tensor
    problem: Problem
    inputs: Inputs
    y: Tensor
    saved: Saved


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, mask, seq_idx, form, *parameters):
        p = Parameters(*parameters)
        step = _until_norm(projected, mask, seq_idx, form, p, save=False)
        normed = norm_forward(_rows(step.y), _rows(step.z), p.norm_weight, *_norm_form(form, p))
        ctx.save_for_backward(projected, mask, seq_idx, *parameters)
        ctx.form = form
        bias = None if p.out_bias is None else p.out_bias.to(normed.dtype)
        with torch.autocast(projected.device.type, enabled=False):
            out = F.linear(normed, p.out_weight.to(normed.dtype), bias)
        return out.view(*projected.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        projected, mask, seq_idx, *parameters = ctx.saved_tensors
        form, p = ctx.form, Parameters(*parameters)
        step = _until_norm(projected, mask, seq_idx, form, p, save=True)
        dprojected = torch.empty_like(projected)
        dz, dxBC, ddt, unread = dprojected.split(_widths(projected, p), dim=-1)
        unread.zero_()

        dout = _rows(dout.to(projected.dtype).contiguous())
        dnormed = dout @ p.out_weight.to(dout.dtype)
        dy, dnorm_weight, normed = norm_backward(
            dnormed, _rows(step.y), _rows(step.z), p.norm_weight, *_norm_form(form, p), dz=_rows(dz), again=True
        )
        dout_weight = dout.t() @ normed
        del normed, dnormed
        grads = scan_backward(step.problem, step.inputs, step.saved, dy.view(step.inputs.x.shape), None)
        one_of, both_of = grads.dt
        dt_grad = one_of if both_of is None else torch.cat([one_of, both_of], dim=-1)
        ddt.copy_(dt_grad if mask is None else dt_grad.masked_fill_(~mask[..., None], 0.0))
        dparts = [t for t in (grads.x, grads.B[0], grads.C[0], grads.B[1], grads.C[1]) if t is not None]
        b, l, _ = projected.shape
        dconv_weight, dconv_bias = conv_backward(
            [t.view(b, l, -1) for t in dparts], step.xBC, *_conv_form(form, p), *kernel_flags(mask, seq_idx), dxBC
        )

        def joined(pair):
            return pair[0] if pair[1] is None else torch.cat(pair)

        gradients = Parameters(
            conv_weight=dconv_weight,
            conv_bias=dconv_bias,
            dt_bias=joined(grads.bias),
            A=joined(grads.A),
            D=grads.D,
            norm_weight=dnorm_weight,
            out_weight=dout_weight,
            out_bias=None if p.out_bias is None else dout.sum(0, dtype=torch.float32),
        )
        cast = (None if g is None else g.to(t.dtype) for g, t in zip(gradients, p, strict=True))
        return dprojected, None, None, None, *cast


def _until_norm(projected: Tensor, mask, seq_idx, form: Form, p: Parameters, save: bool) -> _Step:
    b, l, _ = projected.shape
    z, xBC, dt, _ = projected.split(_widths(projected, p), dim=-1)
    heads = p.D.shape[0]
    d_BC = form.ngroups * form.d_state
    directions = 1 if form.tied else 2
    sizes = [heads * form.headdim, *[d_BC] * (2 * directions)]
    parts = conv_forward(xBC, *_conv_form(form, p), *kernel_flags(mask, seq_idx), sizes)
    x = parts[0].view(b, l, heads, form.headdim)
    B, C, *back = (t.view(b, l, form.ngroups, form.d_state) for t in parts[1:])
    # softplus(-1e4) is exactly 0: padding neither decays nor adds
    dt = dt.contiguous() if mask is None else dt.masked_fill(~mask[..., None], -1e4)
    A, bias = p.A.float(), p.dt_bias.float()
    if form.tied:
        pairs = [(t, t) for t in (dt, A, B, C, bias)]
    else:
        halves = [tuple(t.contiguous() for t in v.chunk(2, dim=-1)) for v in (dt, A, bias)]
        pairs = [halves[0], halves[1], (B, back[0]), (C, back[1]), halves[2]]
    problem = Problem(
        b=b,
        l=l,
        h=heads,
        g=form.ngroups,
        p=form.headdim,
        n=form.d_state,
        dtype=projected.dtype,
        device=projected.device,
        bidirectional=form.bidirectional,
        untied=not form.tied,
        shift=form.shift,
        dt_softplus=True,
        dt_limit=form.dt_limit,
        allow_tf32=form.allow_tf32,
    )
    inputs = Inputs(x, *pairs, D=p.D.float(), z=None, seq_idx=seq_idx, initial=(None, None))
    y, _, saved = scan_forward(problem, inputs, save=save, keep_ungated=False, final=False)
    return _Step(parts, xBC, z, problem, inputs, y.view(b, l, -1), saved)


def _widths(projected: Tensor, p: Parameters) -> list[int]:
    sizes = [p.norm_weight.shape[0], p.conv_weight.shape[0], p.dt_bias.shape[0]]
    return [*sizes, projected.shape[-1] - sum(sizes)]


def _conv_form(form: Form, p: Parameters) -> tuple:
    left = taps_before(p.conv_weight.shape[1], causal=not form.bidirectional)
    return p.conv_weight, p.conv_bias, form.activate, left


def _norm_form(form: Form, p: Parameters) -> tuple:
    return form.eps, form.norm_before_gate, form.group_size or p.norm_weight.shape[0]


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, 1)
