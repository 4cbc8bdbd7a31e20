"""Sums of partial gradients in a fixed order: no float atomics, so two runs give the same bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba.ops.launch import Launch, ceil_div, once_a_form


@triton.jit(do_not_specialize=["size", "per_row"])
def reduce_kernel(
    first,
    second,
    out,
    size,
    per_row,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    SECOND: tl.constexpr,
    STEP_SECOND: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o % per_row
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(PARTS):
        o_1 = inside + STEP * WIDTH
        p_part = o + k * size.to(tl.int64)
        acc += tl.load(first + p_part + STEP * WIDTH, mask=(o < size) & (o_1 >= 0) & (o_1 < per_row), other=0.0)
        if SECOND:
            o_2 = inside + STEP_SECOND * WIDTH
            m = (o < size) & (o_2 >= 0) & (o_2 < per_row)
            acc += tl.load(second + p_part + STEP_SECOND * WIDTH, mask=m, other=0.0)
    tl.store(out + o, acc.to(out.dtype.element_ty), mask=o < size)


def reduce_parts(parts: list[Tensor], like: Tensor, steps: list[int] | None = None) -> Tensor:
    """Sum over `parts`, one or two tensors `(count * b, l, g, n)` fp32, in the shape and dtype of `like (b, l, g, n)`.

    With `steps`, row l of the result takes row `l + step` of a tensor, nothing where that lies outside.
    """
    out = torch.empty_like(like)
    _reduce(out.device, out.shape, parts[0].shape[0] // out.shape[0], tuple(steps or [0] * len(parts)))(
        first=parts[0], second=parts[-1], out=out
    )
    return out


@once_a_form
def _reduce(device: torch.device, shape: torch.Size, parts: int, steps: tuple[int, ...]) -> Launch:
    return Launch(
        reduce_kernel,
        ceil_div(shape.numel(), 1024),
        device,
        size=shape.numel(),
        per_row=shape[1:].numel(),
        PARTS=parts,
        STEP=steps[0],
        SECOND=len(steps) == 2,
        STEP_SECOND=steps[-1],
        WIDTH=shape[2] * shape[3],
        BLOCK=1024,
        num_warps=4,
    )
