"""The kernels compile for GPUs that are not here: sm_80, sm_86 (99 KB of shared memory, as sm_89 and sm_120), sm_90
(descriptors), sm_100 and AMD's gfx942."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILOBYTES = {"cuda:80": 163, "cuda:86": 99, "cuda:90": 227, "cuda:100": 227, "hip:gfx942": 64}
SHARED_MEMORY = {target: size * 1024 for target, size in KILOBYTES.items()}


def compiled(target, tmp_path, flags, config):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    script = str(Path(__file__).parent / "offline.py")
    command = [sys.executable, script, target, "bfloat16", json.dumps(flags), json.dumps(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    for k in kernels:
        assert k["shared"] <= SHARED_MEMORY[target], k
    return kernels


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_compiles(target, tmp_path):
    tma = target == "cuda:90"  # what the rule takes
    recompute = target in ("cuda:80", "cuda:90")
    flags, config = {"recompute": recompute}, {"tma": tma, "walk": tma, "passing_stages": 4}
    kernels = compiled(target, tmp_path, flags, config)
    names = {k["kernel"] for k in kernels}
    assert names >= {"states_kernel", "output_kernel", "gradients_kernel", "grad_dt_kernel"}
    assert names >= {
        "conv_kernel",
        "conv_grad_kernel",
        "norm_kernel",
        "norm_grad_kernel",
        "prepare_kernel",
        "total_kernel",
    }
    apart = {"grad_x_kernel", "grad_bc_kernel"}
    assert apart & names == (apart if recompute else set())
    assert ("passing_kernel" in names) == (not tma)


def test_large_blocks_fit_into_a_small_card(tmp_path):
    flags = {"b": 8, "l": 2048, "h": 24, "p": 128, "n": 128, "untied": True, "z": True, "block": False}
    assert len(compiled("cuda:86", tmp_path, flags, {})) >= 5
