"""Where a block's time goes: its stages, and on a GPU each kernel with the bytes that it must move.

    python benchmark/benchmark_block.py                                # a GPU: b64 l1024 d256, bf16
    python benchmark/benchmark_block.py --batch 8 --length 2048 --d_model 768
    python benchmark/benchmark_block.py --device cpu --batch 1 --length 64 --d_model 32 --headdim 16 --dtype fp32

Stages are `depthwise_conv1d`, the scan, `rms_norm_gated`, and the whole `BiMamba2` with its projections; on a GPU by
CUDA graph. Kernels are those of one forward and backward pass of the block, by torch.profiler. The bytes are counted by
hand: each tensor that a kernel has to read or write, once (the states kernel reads x once a direction); vectors of one
number a token and head are left out. Their share is that of a copy from device to device, measured in the same run.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable

import torch
from scans import DTYPES, hardware, milliseconds, report
from torch import Tensor
from torch.autograd import DeviceType

from bimamba.nn import BiMamba2
from bimamba.ops.conv1d import depthwise_conv1d
from bimamba.ops.gated_norm import rms_norm_gated
from bimamba.ops.ssd import bimamba_chunk_scan_combined

STEPS = 10  # of the profile


def stages(block: BiMamba2, u: Tensor) -> dict[str, tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]]:
    """What is called, and the leaves whose gradients are asked for."""
    b, l, _ = u.shape
    d, n, h = block.d_inner, block.ngroups * block.d_state, block.nheads

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=u.device, dtype=u.dtype).requires_grad_()

    xBC, x, dt, y, z = leaf(b, l, d + 2 * n), leaf(b, l, h, block.headdim), leaf(b, l, h), leaf(b, l, d), leaf(b, l, d)
    B, C = leaf(b, l, block.ngroups, block.d_state), leaf(b, l, block.ngroups, block.d_state)
    A = (-torch.rand(h, device=u.device) - 1.0).requires_grad_()
    weight, bias = block.conv1d.weight, block.conv1d.bias

    def conv() -> tuple[Tensor, ...]:
        return depthwise_conv1d(xBC, weight.squeeze(1), bias, split=(d, n, n))

    def scan() -> tuple[Tensor]:
        return (bimamba_chunk_scan_combined(x, dt, A, B, C, D=block.D, dt_bias=block.dt_bias, dt_softplus=True),)

    own = list(block.parameters())
    return {
        "convolution": (conv, [xBC, weight]),
        "scan": (scan, [x, dt, A, B, C]),
        "gated norm": (lambda: (rms_norm_gated(y, z, block.norm.weight),), [y, z, block.norm.weight]),
        "block": (lambda: (block(u),), [u, *own]),
    }


def measured(call: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor], device: str) -> dict[str, float]:
    with torch.no_grad():
        dys = [torch.randn_like(y) for y in call()]

    def forward() -> None:
        with torch.no_grad():
            call()

    def both() -> None:
        torch.autograd.grad(call(), leaves, dys)

    row = {"forward, ms": milliseconds(forward, device), "forward+backward, ms": milliseconds(both, device)}
    if device.startswith("cuda"):
        row["eager f+b, ms"] = milliseconds(both, device, eager=True)
    return row


def bytes_moved(block: BiMamba2, u: Tensor) -> dict[str, int]:
    """By kernel, forward and backward pass together."""
    from bimamba.ops.ssd.binding import states_fit
    from bimamba.ops.ssd.kernels.choose import choose, problem_of

    b, l, _ = u.shape
    size, d, n = u.element_size(), block.d_inner, block.ngroups * block.d_state
    shape = (b, l, block.nheads, block.ngroups, block.headdim, block.d_state)
    problem = problem_of(*shape, u.dtype, u.device, dt_softplus=True)
    saved = states_fit(*shape[:3], block.headdim, block.d_state, True, u.dtype)
    forward, backward = (choose(problem, saved=saved, backward=k) for k in (False, True))

    def states(rows: int) -> int:
        return b * -(-l // rows) * block.nheads * 2 * block.headdim * block.d_state * size

    x, matrix, both = b * l * d * size, b * l * n * size, b * l * (d + 2 * n) * size
    again = 0 if saved else 2 * x + matrix + states(backward.chunk)
    return {
        "conv_kernel": 2 * both,
        "conv_grad_kernel": 3 * both,
        "norm_kernel": 3 * x,
        "norm_grad_kernel": 5 * x,
        "states_kernel": 4 * x + 2 * matrix + states(forward.chunk * forward.fill) + states(backward.chunk) + again,
        "output_kernel": 2 * x + 2 * matrix + states(forward.chunk),  # some of them it reads, the others it writes
        # Side by side they read x, dy and the gradients of the states from memory once
        "gradients_kernel": 3 * x + 4 * matrix + 2 * states(backward.rows),
        "grad_bc_kernel": 2 * x + 4 * matrix + 2 * states(backward.rows),
        "grad_x_kernel": 3 * x + 2 * matrix + states(backward.rows),
    }


def kernels(block: BiMamba2, u: Tensor) -> list[dict]:
    """Time, bytes and bandwidth of each kernel of a forward and backward pass."""
    leaves = [u, *block.parameters()]
    dy = torch.randn_like(block(u).detach())
    for _ in range(3):
        torch.autograd.grad(block(u), leaves, dy)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(STEPS):
            torch.autograd.grad(block(u), leaves, dy)
        torch.cuda.synchronize()
    spent, launches = Counter(), Counter()
    for event in profile.key_averages():
        if event.device_type != DeviceType.CUDA:  # calls that launch
            continue
        spent[event.key] += event.self_device_time_total / STEPS
        launches[event.key] += event.count
    moved, copy = bytes_moved(block, u), copy_bandwidth()
    rows = []
    for name, us in spent.most_common():
        row = {"kernel": name[:50], "launches": launches[name] / STEPS, "us": us}
        if name in moved:
            bandwidth = moved[name] / us * 1e6
            row |= {"MB": moved[name] / 1e6, "TB/s": bandwidth / 1e12, "share of a copy": bandwidth / copy}
        rows.append(
            {k: row.get(k, float("nan")) for k in ("kernel", "launches", "us", "MB", "TB/s", "share of a copy")}
        )
    return rows


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), "cuda") * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in (("batch", 64), ("length", 1024), ("d_model", 256), ("d_state", 64), ("headdim", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--name", default="block", help="of the result files")
    a = parser.parse_args()
    torch.manual_seed(0)
    block = BiMamba2(a.d_model, d_state=a.d_state, headdim=a.headdim, device=a.device, dtype=DTYPES[a.dtype])
    u = torch.randn(a.batch, a.length, a.d_model, device=a.device, dtype=DTYPES[a.dtype], requires_grad=True)
    rows = [{"stage": k, **measured(*stage, a.device)} for k, stage in stages(block, u).items()]
    sizes = f"b{a.batch} l{a.length} d{a.d_model} n{a.d_state} p{a.headdim} {a.dtype}"
    report(a.name, rows, "stage", "ms", f"{sizes}, {hardware(a.device)}")
    if a.device.startswith("cuda"):
        report(
            f"{a.name}_kernels", kernels(block, u), "kernel", "us", f"kernels of a step, {sizes}, {hardware(a.device)}"
        )


if __name__ == "__main__":
    main()
