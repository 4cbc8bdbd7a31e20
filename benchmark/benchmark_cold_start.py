"""Seconds of the first forward+backward of a shape, in a fresh process: with an empty compiler cache, then with a
full one.

python benchmark/benchmark_cold_start.py
python benchmark/benchmark_cold_start.py --device cpu      # the PyTorch path: nothing to compile
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

FIRST_STEP = """
import sys, time
sys.path.insert(0, "benchmark")
import torch, scans
device, dtype = sys.argv[1], scans.DTYPES[sys.argv[2]]
t = scans.inputs(*map(int, sys.argv[3:]), dtype, device)
torch.ones(1, device=device).sum().item()
start = time.perf_counter()
scans.step(scans.bidirectional, t, True)()
if device != "cpu":
    torch.cuda.synchronize()
print(time.perf_counter() - start)
"""
SHAPES = {"small": (2, 256, 4, 16, 1, 16), "base": (8, 2048, 24, 64, 1, 64), "wide state": (8, 2048, 24, 64, 1, 128)}


def first_step(device: str, dtype: str, shape: tuple[int, ...], cache: str) -> float:
    command = [sys.executable, "-c", FIRST_STEP, device, dtype, *map(str, shape)]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])


def main() -> None:
    import torch
    from scans import hardware, report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    dtype = "bf16" if a.device != "cpu" else "fp32"
    rows = []
    for label, shape in list(SHAPES.items())[: None if a.device != "cpu" else 1]:
        with tempfile.TemporaryDirectory() as cache:
            cold = first_step(a.device, dtype, shape, cache)
            rows.append({"shape": label, "cold": cold, "warm": first_step(a.device, dtype, shape, cache)})
        print(rows[-1], flush=True)
    report("cold_start", rows, "shape", "s", f"first forward+backward, seconds, {dtype}, {hardware(a.device)}")


if __name__ == "__main__":
    main()
