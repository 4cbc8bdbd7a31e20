"""The kernels compile for GPUs that are not here: sm_80, sm_86 (99 KB of shared memory, as sm_89 and sm_120), sm_90
(descriptors), sm_100 and AMD's gfx942."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from offline import wrong_sums

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
        assert not k.get("wrong_sums"), k
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


def test_wrong_sums_are_seen():
    """The lines of the kernel that failed, without and with the zero written that the upper half is to come from."""
    low, high = "UIADD3 UR4, UP0, UR7, 0x20, URZ", "UIADD3.X UR5, UR7, -0x3ffffff0, URZ, UP0, !UPT"

    def sass(*lines):
        return "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))

    assert wrong_sums(sass(low, "FADD R1, R2, R3", high)) == [f"{low}; {high}"]
    assert wrong_sums(sass(low, "@P1 UIADD3 UR12, UP1, UR7, 0x20, URZ", high)) == [f"{low}; {high}"]
    for between in ("UMOV UR7, URZ", "@!UP1 UMOV UR7, URZ", "ULDC.64 UR6, c[0x0][0x210]", "R2UR UR7, R0"):
        assert not wrong_sums(sass(low, between, high)), between
    assert not wrong_sums(sass(low, high.replace("UR7", "URZ")))
    low, high = "UIADD3 UR4, UP0, UPT, UR7, 0x20, URZ", "UIADD3.X UR5, UPT, UPT, UR7, UR9, URZ, UP0, !UPT"  # sm_100
    assert wrong_sums(sass(low, high)) and not wrong_sums(sass(low, high.replace("UR7", "UR8")))
