"""Two processes of one training (gloo, CPU), as torchrun starts them, but forked: nobody waits for imports."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

SECONDS = 120


def two_processes(folder: Path, work: Callable[[int], None]) -> list[tuple[int, str]]:
    """Runs `work(rank)` in two processes.

    Returns:
        Of each: its exit code (negative: the signal that ended it; 1: an exception) and what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_start(rank, port, folder, work) for rank in range(2)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + SECONDS
    while len(codes) < 2:
        for rank, child in enumerate(children):
            if rank not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        if time.monotonic() > deadline:
            for rank in {0, 1} - codes.keys():
                os.kill(children[rank], signal.SIGKILL)
        time.sleep(0.02)
    return [(codes[rank], _said(folder, rank).read_text()) for rank in range(2)]


def _said(folder: Path, rank: int) -> Path:
    return folder / f"said_{rank}.txt"


def _start(rank: int, port: int, folder: Path, work: Callable[[int], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(_said(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
        warnings.showwarning = lambda message, *where: print(message)  # not into pytest's own record
        torch.set_num_threads(1)
        env = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({name: str(value) for name, value in env.items()})
        rank_zero_only.rank = rank  # as at import, had there been one
        work(rank)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not the test run's own ending
