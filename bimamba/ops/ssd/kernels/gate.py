"""The gate's gradient: with y = u * SiLU(z), du = dy * SiLU(z) and dz = dy * u * SiLU'(z). Elementwise, one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba.ops.launch import Launch, ceil_div, once_a_form


@triton.jit(do_not_specialize=["size"])
def grad_gate_kernel(dy, ungated, z, du, dz, size, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_dy = tl.load(dy + o, mask=m, other=0.0).to(tl.float32)
    b_u = tl.load(ungated + o, mask=m, other=0.0).to(tl.float32)
    b_z = tl.load(z + o, mask=m, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-b_z))
    tl.store(du + o, (b_dy * b_z * sigmoid).to(du.dtype.element_ty), mask=m)
    slope = sigmoid * (1.0 + b_z * (1.0 - sigmoid))
    tl.store(dz + o, (b_dy * b_u * slope).to(dz.dtype.element_ty), mask=m)


def grad_gate(dy: Tensor, ungated: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the output before the gate, and dz; all `(b, l, h, p)`."""
    du, dz = torch.empty_like(z), torch.empty_like(z)
    _launch(z.device, z.numel())(dy=dy, ungated=ungated, z=z, du=du, dz=dz)
    return du, dz


@once_a_form
def _launch(device: torch.device, size: int) -> Launch:
    return Launch(grad_gate_kernel, ceil_div(size, 2048), device, size=size, BLOCK=2048, num_warps=4)
