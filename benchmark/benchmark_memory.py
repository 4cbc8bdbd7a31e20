"""Peak memory of forward and backward beyond the inputs, in sizes of x; and times, over the shapes of BENCHMARKS.md.

python benchmark/benchmark_memory.py             # needs a GPU
python benchmark/benchmark_memory.py --peer      # also mamba-ssm, whose autotuning takes minutes
python benchmark/benchmark_memory.py --shapes 1 --name _first   # results of its own: memory_first.csv, shapes_first.csv
"""

from __future__ import annotations

import argparse

import torch
from scans import (
    DTYPES,
    bidirectional,
    causal,
    concatenated_peer,
    flipped_peer,
    hardware,
    inputs,
    milliseconds,
    peak,
    peer,
    report,
    save,
    step,
    untied,
    with_own_parameters,
)

SHAPES = {
    "8 2048 24 64 64": (8, 2048, 24, 64, 1, 64),
    "8 2048 24 64 128": (8, 2048, 24, 64, 1, 128),
    "128 196 12 64 64": (128, 196, 12, 64, 1, 64),
    "1 131072 8 64 64": (1, 131072, 8, 64, 1, 64),
    "64 1024 4 64 64": (64, 1024, 4, 64, 1, 64),
    "32 1024 8 64 16": (32, 1024, 8, 64, 1, 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", action="store_true")
    numbers = range(1, len(SHAPES) + 1)
    parser.add_argument("--shapes", type=int, nargs="+", choices=numbers, default=list(numbers), help="by number")
    parser.add_argument("--name", default="", help="behind the names of the result files")
    a = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmark_memory.py measures a GPU's allocator; found no CUDA device")
    runs = {
        "saved": lambda t: bidirectional(t, save_states=True),
        "recomputed": lambda t: bidirectional(t, save_states=False),
        "untied": untied,
        "shifted": lambda t: bidirectional(t, shift=True),
        "causal": causal,
    }
    run = peer() if a.peer else None
    if run is not None:
        runs |= {
            "mamba-ssm causal": run,
            "mamba-ssm flip": flipped_peer(run),
            "mamba-ssm concatenate": concatenated_peer(run),
        }
    memory, times = [], []
    for label, shape in (list(SHAPES.items())[number - 1] for number in a.shapes):
        t = inputs(*shape, DTYPES["bf16"], "cuda")
        size = t["x"].numel() * t["x"].element_size()
        own = with_own_parameters(t)
        memory.append({"b l h p n": label})
        row = {"b l h p n": label}
        for k, f in runs.items():
            given = own if k == "untied" else t
            memory[-1][k] = peak(step(f, given, True)) / size
            if k != "recomputed":
                row[f"{k} fwd"] = milliseconds(step(f, given, False), "cuda")
            row[f"{k} fwd+bwd"] = milliseconds(step(f, given, True), "cuda")
            row[f"{k} eager"] = milliseconds(step(f, given, True), "cuda", eager=True)
        times.append(row)
        print(memory[-1], row, flush=True)
        save(f"memory{a.name}", memory)  # a row may take minutes: what is measured is not lost
        save(f"shapes{a.name}", times)
    title = f"peak of forward+backward beyond the inputs, {hardware('cuda')}"
    report(f"memory{a.name}", memory, "b l h p n", "sizes of x", title)
    title = f"ms, CUDA graph (eager where it says so), bf16, {hardware('cuda')}"
    report(f"shapes{a.name}", times, "b l h p n", "ms", title)


if __name__ == "__main__":
    main()
