"""Trainings one after the other in one process, as a sweep runs them, some of several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed import destroy_process_group, get_world_size, is_initialized

GROUP = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what the processes of one are told


@contextmanager
def alone_again() -> Iterator[None]:
    """Behind a job that was a group of one process (`trainer=ddp trainer.devices=1`), the next one may start several.

    Lightning (2.6) keeps the group, and the variables that it set for it, as long as the process lives: the next job
    would take its processes for started and that group for theirs. And PyTorch keeps the compiled graphs of the job's
    network, and counts them against the limit of the next one's.
    """
    before = set(os.environ)
    try:
        yield
    finally:
        torch.compiler.reset()
        if "LOCAL_RANK" not in before and is_initialized() and get_world_size() == 1:
            destroy_process_group()
            for name in set(GROUP) & set(os.environ) - before:
                del os.environ[name]
