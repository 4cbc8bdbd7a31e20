"""The convolution as PyTorch operators, `bimamba::conv1d` and `bimamba::conv1d_backward`, with fakes and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..entrance import below_autograd, differentiable, enter, implement, once
from ..totals import Total, totals
from .kernels import by_taps, conv_backward, conv_forward, form_of
from .reference import taps_before

_library = torch.library.Library("bimamba", "FRAGMENT")
_library.define(
    "conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, Tensor? seq_idx, bool activate, bool causal, "
    "int[] split) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "conv1d_backward(Tensor?[] dys, Tensor x, Tensor weight, Tensor? bias, Tensor? mask, Tensor? seq_idx, "
    "bool activate, bool causal, int[] split) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activate: bool,
    causal: bool,
    mask: Tensor | None,
    seq_idx: Tensor | None,
    split: list[int],
) -> list[Tensor]:
    """See `api.depthwise_conv1d`; the parts of the output."""
    if seq_idx is not None:
        seq_idx = seq_idx.to(torch.int32)
    args = (x, weight, bias, mask, seq_idx, activate, causal, split)
    return list(enter(torch.ops.bimamba.conv1d.default, _Conv1d, _forward, *args))


def rows_apart(x: Tensor) -> Tensor:
    """x `(b, l, d)` with channels side by side and all rows, also across the batch, at one distance."""
    b, l, _ = x.shape
    regular = x.stride(2) == 1 and (b == 1 or x.stride(0) == l * x.stride(1))
    return x if regular else x.contiguous()


def kernel_flags(mask: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Mask and ids as the kernels read them."""
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    return mask, None if seq_idx is None else seq_idx.contiguous()


def _forward(x, weight, bias, mask, seq_idx, activate, causal, split):
    left = taps_before(weight.shape[1], causal)
    weight, flags = by_taps(weight), kernel_flags(mask, seq_idx)
    out = [x.new_empty((*x.shape[:2], size)) for size in split]
    conv_forward(form_of(weight, bias, activate, left, *flags, split), rows_apart(x), weight, bias, *flags, out)
    return out


def _backward(dys, x, weight, bias, mask, seq_idx, activate, causal, split):
    b, l, d = x.shape
    dys = [
        torch.zeros((b, l, size), dtype=x.dtype, device=x.device) if dy is None else dy.to(x.dtype).contiguous()
        for dy, size in zip(dys, split, strict=True)
    ]
    dx = torch.empty((b, l, d), dtype=x.dtype, device=x.device)
    left = taps_before(weight.shape[1], causal)
    taps, flags = by_taps(weight), kernel_flags(mask, seq_idx)
    form = form_of(taps, bias, activate, left, *flags, split)
    sums = conv_backward(form, dys, rows_apart(x), taps, bias, *flags, dx)
    dweight = weight.new_empty(weight.shape)
    dbias = None if bias is None else bias.new_empty(bias.shape)
    totals(Total(sums, dweight, dbias, taps=form.width))
    return dx, dweight, weight.new_empty(0) if dbias is None else dbias


def _forward_fake(x, weight, bias, mask, seq_idx, activate, causal, split):
    return [x.new_empty((*x.shape[:2], size)) for size in split]


def _backward_fake(dys, x, weight, bias, mask, seq_idx, activate, causal, split):
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


implement(_library, "conv1d", _forward, _forward_fake)
implement(_library, "conv1d_backward", _backward, _backward_fake)


class _Conv1d(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return tuple(below_autograd(torch.ops.bimamba.conv1d.default, _forward, *args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.flags = inputs[5:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *dys):
        saved = ctx.saved_tensors  # once: checkpointing unpacks anew at every look
        args = (list(dys), *saved, *ctx.flags)
        dx, dweight, dbias = below_autograd(torch.ops.bimamba.conv1d_backward.default, _backward, *args)
        grads = once((dx, dweight, dbias if saved[2] is not None else None), (*dys, *saved))
        return *grads, *([None] * 5)


differentiable(_library, torch.ops.bimamba.conv1d.default, _Conv1d)
