"""bimamba.allocator: large blocks are not mapped anew each time."""

import resource
import subprocess
import sys

import pytest
from runs import ROOT

from bimamba import allocator

PROGRAM = """
import resource
from bimamba.allocator import keep_freed_memory
kept, faults = keep_freed_memory(), []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"x") * 2**26  # 64 MB, all of it written
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, faults[-1])
"""


def faults(**environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


def test_freed_blocks_serve_again():
    kept, count = faults()
    if not kept:
        pytest.skip("this system's malloc is not glibc's, or an older one")
    assert count < 2**26 // resource.getpagesize() / 20
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):  # what the user says holds
        kept, more = faults(**{name: str(2**25)})
        assert not kept and more > count


def test_nothing_is_touched_elsewhere(monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    assert not allocator.keep_freed_memory()
