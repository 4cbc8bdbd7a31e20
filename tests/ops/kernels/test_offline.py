"""The kernels compile for GPUs that are not here: sm_80, sm_90 (descriptors), sm_100 and AMD's gfx942."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "cuda:100": 227 * 1024, "hip:gfx942": 64 * 1024}


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_compiles(target, tmp_path):
    tma = target == "cuda:90"  # what the rule takes
    config = {"tma": tma, "walk": tma, "passing_stages": 4}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, str(Path(__file__).parent / "offline.py"), target, "bfloat16", "{}", json.dumps(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = {k["kernel"] for k in kernels}
    assert names >= {"states_kernel", "output_kernel", "grad_x_kernel", "grad_bc_kernel", "grad_dt_kernel"}
    assert names >= {
        "conv_kernel",
        "conv_grad_kernel",
        "norm_kernel",
        "norm_grad_kernel",
        "prepare_kernel",
        "total_kernel",
    }
    assert ("passing_kernel" in names) == (not tma)
    for k in kernels:
        assert k["shared"] <= SHARED_MEMORY[target], k
