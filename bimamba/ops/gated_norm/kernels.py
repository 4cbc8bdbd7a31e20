"""Triton kernels of the gated norm: a program holds whole groups of channels of some rows and reads all of it once."""

# ruff: noqa: SIM102 - branches on constexpr flags compile one side only; ternaries and `and` would not

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ceil_div, launch

PROGRAMS = 1024  # of the gradient, which sums its weight's gradient over the rows it walks


@triton.jit(do_not_specialize=["M", "eps"])
def norm_kernel(
    y,
    z,
    weight,
    out,
    M,
    eps,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    STRIDE_Z: tl.constexpr,
    GATED: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0)
    o = tl.arange(0, COLUMNS)
    o_c = (pid % (D // GROUP)) * GROUP + o
    r = (pid // (D // GROUP)).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_c = (o < GROUP)[None, :]
    m = (r < M)[:, None] & m_c
    v = tl.load(y + r[:, None] * D + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    w = tl.load(weight + o_c[None, :], mask=m_c, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(z + r[:, None] * STRIDE_Z + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        gate = gate / (1.0 + tl.exp(-gate))
        if not NORM_FIRST:
            v *= gate
    v *= tl.rsqrt(tl.sum(v * v, 1) / GROUP + eps)[:, None] * w
    if GATED:
        if NORM_FIRST:
            v *= gate
    tl.store(out + r[:, None] * D + o_c[None, :], v.to(out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["M", "eps", "STEPS"])
def norm_grad_kernel(
    dout,
    y,
    z,
    weight,
    dy,
    dz,
    out,
    sums,
    M,
    eps,
    STEPS,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    STRIDE_Z: tl.constexpr,
    STRIDE_DZ: tl.constexpr,
    GATED: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    AGAIN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """With n = v / rms(v): dv = (dn - n mean(dn n)) / rms(v). AGAIN: writes the output once more, for whoever did not
    keep it."""
    pid = tl.program_id(0)
    i_part = pid // (D // GROUP)
    o = tl.arange(0, COLUMNS)
    o_c = (pid % (D // GROUP)) * GROUP + o
    m_c = (o < GROUP)[None, :]
    w = tl.load(weight + o_c[None, :], mask=m_c, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, COLUMNS), tl.float32)  # summed over the rows at the end
    for step in range(STEPS):
        r = (i_part.to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m = (r < M)[:, None] & m_c
        o_m = r[:, None] * D + o_c[None, :]
        g = tl.load(dout + o_m, mask=m, other=0.0).to(tl.float32)
        b_y = tl.load(y + o_m, mask=m, other=0.0).to(tl.float32)
        v = b_y
        if GATED:
            b_z = tl.load(z + r[:, None] * STRIDE_Z + o_c[None, :], mask=m, other=0.0).to(tl.float32)
            sigmoid = 1.0 / (1.0 + tl.exp(-b_z))
            gate = b_z * sigmoid
            if not NORM_FIRST:
                v = b_y * gate
        scale = tl.rsqrt(tl.sum(v * v, 1) / GROUP + eps)[:, None]
        n = v * scale
        if AGAIN:
            b_out = n * w
            if GATED:
                if NORM_FIRST:
                    b_out *= gate
            tl.store(out + o_m, b_out.to(out.dtype.element_ty), mask=m)
        dn = g
        if GATED:
            if NORM_FIRST:
                dn = g * gate
        dw += dn * n
        dn *= w
        dv = (dn - n * (tl.sum(dn * n, 1) / GROUP)[:, None]) * scale
        if GATED:
            if NORM_FIRST:
                dgate = g * n * w
            else:
                dgate = dv * b_y
                dv *= gate
            b_dz = dgate * sigmoid * (1.0 + b_z * (1.0 - sigmoid))
            tl.store(dz + r[:, None] * STRIDE_DZ + o_c[None, :], b_dz.to(dz.dtype.element_ty), mask=m)
        tl.store(dy + o_m, dv.to(dy.dtype.element_ty), mask=m)
    tl.store(sums + i_part.to(tl.int64) * D + o_c, tl.sum(dw, 0), mask=o < GROUP)


def norm_forward(
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    norm_before_gate: bool,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`(m, d)` in `dtype`, by default that of y; y `(m, d)` contiguous, z `(m, d)` with channels side by side."""
    m, d = y.shape
    out = torch.empty_like(y, dtype=dtype)
    shape = _shape(group_size)
    launch(
        norm_kernel,
        ceil_div(m, shape["ROWS"]) * (d // group_size),
        y.device,
        y=y,
        z=z,
        weight=weight,
        out=out,
        M=m,
        eps=eps,
        D=d,
        GROUP=group_size,
        STRIDE_Z=d if z is None else z.stride(0),
        GATED=z is not None,
        NORM_FIRST=norm_before_gate,
        **shape,
    )
    return out


def norm_backward(
    dout: Tensor,
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    norm_before_gate: bool,
    group_size: int,
    dz: Tensor | None = None,
    again: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dy `(m, d)`, dweight `(d)` fp32 and, if `again`, the output; `dz (m, d)` is written."""
    m, d = y.shape
    dy = torch.empty_like(y)
    out = torch.empty_like(y) if again else None
    shape = _shape(group_size)
    blocks = ceil_div(m, shape["ROWS"])
    steps = ceil_div(blocks, PROGRAMS)
    parts = ceil_div(blocks, steps)
    sums = torch.empty((parts, d), dtype=torch.float32, device=y.device)
    launch(
        norm_grad_kernel,
        parts * (d // group_size),
        y.device,
        dout=dout,
        y=y,
        z=z,
        weight=weight,
        dy=dy,
        dz=dz,
        out=out,
        sums=sums,
        M=m,
        eps=eps,
        STEPS=steps,
        D=d,
        GROUP=group_size,
        STRIDE_Z=d if z is None else z.stride(0),
        STRIDE_DZ=d if dz is None else dz.stride(0),
        GATED=z is not None,
        NORM_FIRST=norm_before_gate,
        AGAIN=again,
        **shape,
    )
    return dy, sums.sum(0), out


def _shape(group_size: int) -> dict[str, int]:
    columns = 1 << (group_size - 1).bit_length()
    return dict(ROWS=max(1, 2048 // columns), COLUMNS=columns, num_warps=4 if columns <= 4096 else 8)
