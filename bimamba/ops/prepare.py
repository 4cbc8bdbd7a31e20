"""What the kernels of a block read instead of its parameters, in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, ceil_div, once_a_form

BLOCK = 1024


class Prepared(NamedTuple):
    A: Tensor  # (heads) fp32
    taps: Tensor  # (width, d): see `conv1d.kernels.by_taps`


@triton.jit
def prepare_kernel(
    A_log, weight, A, taps, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # In double precision: rounded once, and closer than the plain units' exponential
    value = -tl.exp(tl.load(A_log + o, mask=o < HEADS, other=0.0).to(tl.float64))
    tl.store(A + o, value.to(tl.float32), mask=o < HEADS)
    m = o < D * WIDTH
    tl.store(taps + o, tl.load(weight + o % D * WIDTH + o // D, mask=m, other=0.0), mask=m)


def prepare(A_log: Tensor, conv_weight: Tensor) -> Prepared:
    """`A = -exp(A_log)`, and the convolution's weight `(d, 1, width)` by taps."""
    d, _, width = conv_weight.shape
    A = torch.empty_like(A_log, dtype=torch.float32)
    taps = conv_weight.new_empty((width, d))
    launch = _launch(A_log.device, A_log.shape[0], d, width)
    launch(A_log=A_log, weight=conv_weight.contiguous(), A=A, taps=taps)
    return Prepared(A, taps)


@once_a_form
def _launch(device: torch.device, heads: int, d: int, width: int) -> Launch:
    programs = ceil_div(max(heads, d * width), BLOCK)
    return Launch(prepare_kernel, programs, device, HEADS=heads, D=d, WIDTH=width, BLOCK=BLOCK, num_warps=4)
