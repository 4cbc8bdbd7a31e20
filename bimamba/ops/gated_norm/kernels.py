"""Triton kernels of the gated norm: a program holds whole groups of channels of some rows and reads all of it once."""

# ruff: noqa: SIM102 - branches on constexpr flags compile one side only; ternaries and `and` would not

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, ceil_div, once_a_form, row_stride

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
    out: Tensor,
) -> None:
    """Writes `out`; y and out contiguous, of any shape whose rows are as long as weight `(d)`; z `(..., d)` with rows
    at one distance."""
    d = weight.shape[0]
    stride = None if z is None else row_stride(z)
    launch = _forward(y.device, y.numel() // d, d, stride, eps, norm_before_gate, group_size)
    launch(y=y, z=z, weight=weight, out=out)


@once_a_form
def _forward(
    device: torch.device, m: int, d: int, stride: int | None, eps: float, norm_before_gate: bool, group_size: int
) -> Launch:
    """`stride`: of z, None where there is none."""
    blocks = _shape(group_size)
    return Launch(
        norm_kernel,
        ceil_div(m, blocks["ROWS"]) * (d // group_size),
        device,
        M=m,
        eps=eps,
        D=d,
        GROUP=group_size,
        STRIDE_Z=d if stride is None else stride,
        GATED=stride is not None,
        NORM_FIRST=norm_before_gate,
        **blocks,
    )


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
    """dy, dweight in parts `(parts, d)` fp32 and, if `again`, the output; shapes as in the forward pass. `dz`, with
    rows at one distance, is written."""
    d = weight.shape[0]
    dy = torch.empty_like(y)
    out = torch.empty_like(y) if again else None
    strides = (None, None) if z is None or dz is None else (row_stride(z), row_stride(dz))
    launch, parts = _backward(y.device, y.numel() // d, d, *strides, eps, norm_before_gate, group_size, again)
    sums = torch.empty((parts, d), dtype=torch.float32, device=y.device)
    launch(dout=dout, y=y, z=z, weight=weight, dy=dy, dz=dz, out=out, sums=sums)
    return dy, sums, out


@once_a_form
def _backward(
    device: torch.device,
    m: int,
    d: int,
    stride: int | None,
    stride_dz: int | None,
    eps: float,
    norm_before_gate: bool,
    group_size: int,
    again: bool,
) -> tuple[Launch, int]:
    """The launch, and in how many parts it writes dweight. `stride`: of z, None where there is none."""
    blocks = _shape(group_size)
    count = ceil_div(m, blocks["ROWS"])
    steps = max(1, ceil_div(count, PROGRAMS))  # no rows: no parts, which sum to zero
    parts = ceil_div(count, steps)
    launch = Launch(
        norm_grad_kernel,
        parts * (d // group_size),
        device,
        M=m,
        eps=eps,
        STEPS=steps,
        D=d,
        GROUP=group_size,
        STRIDE_Z=d if stride is None else stride,
        STRIDE_DZ=d if stride_dz is None else stride_dz,
        GATED=stride is not None,
        NORM_FIRST=norm_before_gate,
        AGAIN=again,
        **blocks,
    )
    return launch, parts


def _shape(group_size: int) -> dict[str, int]:
    columns = 1 << (group_size - 1).bit_length()
    return dict(ROWS=max(1, 2048 // columns), COLUMNS=columns, num_warps=4 if columns <= 4096 else 8)
