"""What the GPU benchmarks share: problems, the scans that are compared, clocks, and the table / CSV / plot of a
result."""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bimamba.ops.ssd.api import bimamba_chunk_scan_combined, mamba_chunk_scan_combined

FOLDER = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def arguments(text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--headdim", type=int, default=16)
    parser.add_argument("--dstate", type=int, default=16)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="defaults are Bi-Mamba2's own shape")
    parser.add_argument("--longest", type=int, default=17, help="lengths 2^1 .. 2^LONGEST")
    parser.add_argument("--name", default="", help="suffix of the result files")
    return parser


def inputs(b: int, l: int, h: int, p: int, g: int, n: int, dtype: torch.dtype, device: str, seed: int = 0) -> dict:
    """x, dt, A, B, C, D, dt_bias of sizes and magnitudes that a trained block has, on leaves that require gradients."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, device=device, generator=generator)

    tensors = dict(
        x=draw(b, l, h, p).to(dtype),
        dt=(draw(b, l, h) * 0.5 - 3).to(dtype),
        A=-torch.rand(h, device=device, generator=generator) * 15 - 1,
        B=(draw(b, l, g, n) / n**0.5).to(dtype),
        C=draw(b, l, g, n).to(dtype),
        D=draw(h),
        dt_bias=draw(h) * 0.1,
    )
    return {k: v.requires_grad_() for k, v in tensors.items()}


def bidirectional(t: dict, **options) -> Tensor:
    return bimamba_chunk_scan_combined(**t, dt_softplus=True, **options)


OWN = ("dt", "A", "B", "C", "dt_bias")  # what a direction may have to itself


def with_own_parameters(t: dict) -> dict:
    """The inputs, and leaves of its own for the backward direction."""
    return t | {f"{k}_back": t[k].detach().clone().requires_grad_() for k in OWN}


def untied(t: dict) -> Tensor:
    """Of `with_own_parameters`."""
    return bidirectional({k: (t[k], t[f"{k}_back"]) if k in OWN else t[k] for k in t if not k.endswith("_back")})


def causal(t: dict, **options) -> Tensor:
    return mamba_chunk_scan_combined(**t, dt_softplus=True, **options)


def naive_flip(t: dict, **options) -> Tensor:
    """Two causal scans, one on flipped inputs: what a user without a bidirectional kernel writes."""
    back = {k: v.flip(1) if k in ("x", "dt", "B", "C") else v for k, v in t.items() if k != "D"}
    return causal(t, **options) + causal(back, **options).flip(1)


def peer() -> Callable | None:
    """mamba-ssm's Mamba-2 scan of one direction; None with a line where it is not importable."""
    try:
        sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))  # Mamba-1's, not used
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as scan
    except Exception as error:
        print(f"mamba-ssm skipped: {type(error).__name__}: {error}")
        return None

    def run(t: dict) -> Tensor:
        rest = {k: t[k] for k in ("D", "dt_bias") if k in t}
        return scan(t["x"], t["dt"], t["A"], t["B"], t["C"], chunk_size=256, dt_softplus=True, **rest)

    return run


def flipped_peer(run: Callable) -> Callable:
    def both(t: dict) -> Tensor:
        back = {k: v.flip(1) if k in ("x", "dt", "B", "C") else v for k, v in t.items() if k != "D"}
        return run(t) + run(back).flip(1)

    return both


def concatenated_peer(run: Callable) -> Callable:
    """Hydra's way: one call on the batch of both orders."""

    def both(t: dict) -> Tensor:
        joined = {k: torch.cat([v, v.flip(1)]) if k in ("x", "dt", "B", "C") else v for k, v in t.items()}
        forward, backward = run(joined).chunk(2)
        return forward + backward.flip(1)

    return both


def step(run: Callable, t: dict, backward: bool) -> Callable:
    """A call without gradients, or a call with the gradients of all inputs."""
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                run(t)

        return forward
    dy = torch.randn_like(t["x"])
    leaves = list(t.values())
    return lambda: torch.autograd.grad(run(t), leaves, dy)


def milliseconds(f: Callable, device: str, eager: bool = False) -> float:
    """Median time. On a GPU: of the replay of a CUDA graph (kernel time), or with `eager` of call and device
    together."""
    f()
    if device.startswith("cuda") and not eager:
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(f, rep=50, return_mode="median")
    times, start = [], time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < 0.3 and len(times) < 200):
        begin = time.perf_counter()
        f()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def peak(f: Callable) -> int:
    """Bytes at the peak of a step, beyond what is alive before it."""
    f()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    f()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def hardware(device: str) -> str:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    return f"{name}, torch {torch.__version__}, triton {version}"


def save(name: str, rows: list[dict]) -> None:
    """Rows of the same columns, to results/NAME.csv."""
    FOLDER.mkdir(exist_ok=True)
    with open(FOLDER / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def report(name: str, rows: list[dict], x: str, unit: str, title: str) -> None:
    """Prints the rows as a table and writes them to results/NAME.csv, with a plot over column `x` to
    results/NAME.png."""
    columns = list(rows[0])
    print(f"\n{title}\n" + " | ".join(columns))
    for row in rows:
        print(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    save(name, rows)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    lines = [c for c in columns if c != x and isinstance(rows[0][c], float)]
    for column in lines:
        points = [(row[x], row[column]) for row in rows if row[column] == row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=column)
    if isinstance(rows[0][x], int):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(FOLDER / f"{name}.png", dpi=120)
    print(f"written: {FOLDER / name}.csv and .png")


def over_lengths(text: str, backward: bool, name: str) -> None:
    """The benchmark of one pass over lengths 2^1 .. 2^17."""
    parser = arguments(text)
    parser.add_argument("--eager", action="store_true", help="time calls, launches included, not CUDA graphs")
    parser.add_argument("--peer", action="store_true", help="also mamba-ssm (autotunes for minutes at first use)")
    a = parser.parse_args()
    runs = {"naive flip": naive_flip, "bidirectional": bidirectional, "causal": causal}
    run = peer() if a.peer and a.device.startswith("cuda") else None
    if run is not None:
        runs |= {
            "mamba-ssm causal": run,
            "mamba-ssm flip": flipped_peer(run),
            "mamba-ssm concatenate": concatenated_peer(run),
        }
    rows = []
    for power in range(1, a.longest + 1):
        l = 2**power
        t = inputs(a.batch, l, a.heads, a.headdim, a.groups, a.dstate, DTYPES[a.dtype], a.device)
        row = {"length": l}
        for label, f in runs.items():
            row[label] = milliseconds(step(f, t, backward), a.device, a.eager)
        rows.append(row)
        print(row, flush=True)
    shape = f"b{a.batch} h{a.heads} p{a.headdim} g{a.groups} n{a.dstate} {a.dtype}"
    what = "forward and backward" if backward else "forward"
    clock = "eager" if a.eager or not a.device.startswith("cuda") else "CUDA graph"
    report(f"{name}{a.name}", rows, "length", "ms", f"{what}, ms ({clock}), {shape}, {hardware(a.device)}")
