"""`python -m bimamba.doctor`: what this machine runs, whether it computes the truth, and how fast. Warms the compiler
cache.

Prints versions, GPU, the backend that `backend="auto"` takes and why, the errors of outputs and of every gradient
against float64, and the time of a standard shape against what is expected of this GPU. Exit code 1 if an error is
beyond its bound.
"""

from __future__ import annotations

import platform
import statistics
import time
from typing import Any

import torch

from bimamba.ops.backend import triton_unavailable
from bimamba.ops.ssd.api import bimamba_chunk_scan_combined, choose_backend

# Relative errors that the kernels keep (tests/ops/kernels); the PyTorch path is better than its dtype's rounding
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}
Sizes = tuple[int, int, int, int, int, int]  # b l h p g n
# Of `parity`: for kernels on plain addresses, and for those on tensor descriptors, which Hopper has
SMALL, LARGE = (2, 500, 8, 64, 2, 64), (4, 1100, 64, 64, 2, 64)
STANDARD = (8, 2048, 24, 64, 1, 64)
# Milliseconds of forward+backward at the standard shape, bf16, CUDA graph: measured where a note says so in
# BENCHMARKS.md (H100); others by memory bandwidth, which bounds it: TB/s of the data sheet against the H100's 3.35
EXPECTED = {"H100": 0.45}
BANDWIDTH = {
    "H100": 3.35,
    "H200": 4.8,
    "A100": 2.0,
    "L40S": 0.864,
    "4090": 1.01,
    "5090": 1.79,
    "B200": 8.0,
    "MI300X": 5.3,
}


def problem(b, l, h, p, g, n, dtype, device) -> dict:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    t = dict(x=draw(b, l, h, p), dt=draw(b, l, h) * 0.5 - 3, A=-torch.rand(h, generator=generator) * 15 - 1)
    t |= dict(B=draw(b, l, g, n) / n**0.5, C=draw(b, l, g, n), D=draw(h), dt_bias=draw(h) * 0.1)
    keep = ("A", "D", "dt_bias")
    return {k: v.to(device, torch.float32 if k in keep else dtype) for k, v in t.items()}


def outputs(t: dict, backend: str, **options) -> dict:
    t = {k: v.detach().requires_grad_() for k, v in t.items()}
    y: Any = bimamba_chunk_scan_combined(**t, dt_softplus=True, backend=backend, **options)
    dy = torch.sin(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype)
    return {"y": y, **dict(zip((f"d{k}" for k in t), torch.autograd.grad(y, list(t.values()), dy), strict=True))}


def parity(dtype: torch.dtype, device: str, sizes: Sizes = SMALL, **options) -> dict[str, float]:
    """Relative errors against float64, on the same rounded inputs."""
    t = problem(*sizes, dtype, device)
    got = outputs(t, "auto", **options)
    exact = outputs({k: v.double() for k, v in t.items()}, "torch")
    return {k: ((got[k].double() - v).norm() / v.norm()).item() for k, v in exact.items()}


def standard_time(device: str) -> tuple[float, float, float]:
    """Seconds of the first step, then milliseconds of a step: eagerly, and replayed as a CUDA graph (GPU)."""
    shape, dtype = (STANDARD, torch.bfloat16) if device != "cpu" else ((2, 512, 4, 32, 1, 32), torch.float32)
    t = {k: v.requires_grad_() for k, v in problem(*shape, dtype, device).items()}
    dy = torch.randn_like(t["x"])

    def step():
        y = bimamba_chunk_scan_combined(**t, dt_softplus=True)
        torch.autograd.grad(y, list(t.values()), dy)
        if device != "cpu":
            torch.cuda.synchronize()

    def timed():
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    first = timed()
    eager = 1e3 * statistics.median(timed() for _ in range(10))
    if device == "cpu":
        return first, eager, float("nan")
    from triton.testing import do_bench_cudagraph

    def step_alone():
        y: Any = bimamba_chunk_scan_combined(**t, dt_softplus=True)
        return torch.autograd.grad(y, list(t.values()), dy)

    return (
        first,
        eager,
        do_bench_cudagraph(
            step_alone,
            rep=50,
            return_mode="median",
        ),
    )


def expected(name: str) -> str:
    for chip, ms in EXPECTED.items():
        if chip in name:
            return f"expected about {ms:.2f} ms (measured on {chip})"
    for chip, bandwidth in BANDWIDTH.items():
        if chip in name:
            return f"expected about {EXPECTED['H100'] * BANDWIDTH['H100'] / bandwidth:.2f} ms (H100's, by bandwidth)"
    return "no expectation for this GPU: please report the figure"


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        import triton

        version = triton.__version__
    except ImportError as error:
        version = f"none ({error})"
    print(f"python {platform.python_version()}, torch {torch.__version__}, triton {version}, {platform.platform()}")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    print(
        f"device: {name}" + (f", compute capability {torch.cuda.get_device_capability()}" if device == "cuda" else "")
    )
    x = torch.zeros(1, 1, 1, 16, device=device)
    backend = choose_backend(x, 16)
    why = triton_unavailable(x)
    print(f"backend: {backend}" + (f" ({why})" if why and backend != "triton" else ""))
    good = True
    for dtype in BOUNDS if device == "cuda" else (torch.float32,):
        cases: list[tuple[str, Sizes, dict]] = [("", SMALL, {})]
        if dtype != torch.float32:
            cases += [(f", states {k}", LARGE, {"save_states": k == "saved"}) for k in ("saved", "recomputed")]
        for which, sizes, options in cases:
            errors = parity(dtype, device, sizes, **options)
            worst = max(errors, key=lambda k: errors[k] if errors[k] == errors[k] else float("inf"))
            bad = [k for k, v in errors.items() if not v <= BOUNDS[dtype]]
            good &= not bad
            verdict = "ok" if not bad else f"BEYOND {BOUNDS[dtype]}"
            listed = " ".join(f"{k} {v:.1e}" for k, v in errors.items())
            print(f"parity {str(dtype)[6:]}{which}: {verdict}, worst {worst}: {listed}")
    first, eager, graph = standard_time(device)
    print(f"standard step, forward+backward: first {first:.1f} s (the cache is warm now), then {eager:.2f} ms")
    if device == "cuda":
        print(f"  as a CUDA graph {graph:.3f} ms; {expected(name)}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
