"""Set before anything imports torch, triton, wandb or matplotlib: tests are quiet, offline and fair to both cores."""

import contextlib
import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One worker a core: more threads would only wait for each other. And where a test forks, OpenMP's threads of the parent
# do not exist in the child, which then waits for them for ever.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels run on CPU tensors, by Triton's interpreter
    with contextlib.suppress(ImportError):  # no Triton: tests that need it say so
        from interpreter import quicken

        quicken()
