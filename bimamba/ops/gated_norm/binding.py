"""The gated norm as PyTorch operators, `bimamba::gated_norm` and `bimamba::gated_norm_backward`, with autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..entrance import below_autograd, differentiable, enter, implement, once
from ..totals import Total, totals
from .kernels import norm_backward, norm_forward

_library = torch.library.Library("bimamba", "FRAGMENT")
_library.define(
    "gated_norm(Tensor y, Tensor? z, Tensor weight, float eps, bool norm_before_gate, int group_size, "
    "ScalarType? dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "gated_norm_backward(Tensor dout, Tensor y, Tensor? z, Tensor weight, float eps, bool norm_before_gate, "
    "int group_size) -> (Tensor dy, Tensor dz, Tensor dweight)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def gated_norm(
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    norm_before_gate: bool,
    group_size: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """See `api.rms_norm_gated`."""
    args = (y, z, weight, eps, norm_before_gate, group_size, dtype)
    return enter(torch.ops.bimamba.gated_norm.default, _GatedNorm, _forward, *args)


def rows(t: Tensor | None) -> Tensor | None:
    """`(m, d)`, channels side by side: a view where the rows lie at one distance."""
    if t is None:
        return None
    t = t if t.stride(-1) == 1 else t.contiguous()
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


def _forward(y, z, weight, eps, norm_before_gate, group_size, dtype):
    out = y.new_empty(y.shape, dtype=dtype)
    norm_forward(y.contiguous(), rows(z), weight, eps, norm_before_gate, group_size, out)
    return out


def _backward(dout, y, z, weight, eps, norm_before_gate, group_size):
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    tensors = (dout.contiguous(), y.contiguous(), rows(z), weight)
    dy, sums, _ = norm_backward(*tensors, eps, norm_before_gate, group_size, dz=rows(dz))
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    totals(Total(sums, dweight))
    return dy, y.new_empty(0) if dz is None else dz, dweight


def _forward_fake(y, z, weight, eps, norm_before_gate, group_size, dtype):
    return y.new_empty(y.shape, dtype=dtype)


def _backward_fake(dout, y, z, weight, eps, norm_before_gate, group_size):
    dz = y.new_empty(0) if z is None else z.new_empty(z.shape)
    return y.new_empty(y.shape), dz, weight.new_empty(weight.shape)


implement(_library, "gated_norm", _forward, _forward_fake)
implement(_library, "gated_norm_backward", _backward, _backward_fake)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return below_autograd(torch.ops.bimamba.gated_norm.default, _forward, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.flags = inputs[3:6]

    @staticmethod
    def backward(ctx, dout):
        saved = ctx.saved_tensors  # once: checkpointing unpacks anew at every look
        args = (dout, *saved, *ctx.flags)
        dy, dz, dweight = below_autograd(torch.ops.bimamba.gated_norm_backward.default, _backward, *args)
        grads = once((dy, dz if saved[1] is not None else None, dweight), (dout, *saved))
        return *grads, None, None, None, None


differentiable(_library, torch.ops.bimamba.gated_norm.default, _GatedNorm)
