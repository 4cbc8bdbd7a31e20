"""Runs of train.py inside the test process: importing torch and Lightning costs ten seconds, a small run one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from bimamba.overrides import soften

ROOT = Path(__file__).resolve().parents[1]


def _load_train():
    """train.py as a module; it lies in the project's root, which is no package."""
    if "train" not in sys.modules:
        spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
        sys.modules["train"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["train"])
    return sys.modules["train"]


train = _load_train()

# A network and an epoch small enough that a run takes a second or two.
TINY = [
    "trainer=cpu",
    "model.d_model=16",
    "model.depth=1",
    "model.mixer.headdim=8",
    "model.mixer.d_state=8",
    "data.num_workers=0",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "extras.print_config=false",
]
# A Lightning Trainer of a test's own that writes and shows nothing.
QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
# Digits: 8 x 8 pixels as 4 patches.
DIGITS = [*TINY, "model/embedding=patches", "model.embedding.patch_size=4", "data.batch_size=256"]


def composed(output_dir: Path, *overrides: str) -> DictConfig:
    """The configuration of a command line, with its output in a folder of the test."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", [*overrides, f"paths.output_dir={output_dir}"])


def run(output_dir: Path, *overrides: str, choices: dict | None = None) -> dict[str, float]:
    """`python train.py *overrides`, in this process."""
    output_dir.mkdir(parents=True, exist_ok=True)
    typed = soften(overrides)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", [*typed, f"paths.output_dir={output_dir}"])
        return train.train(cfg, typed, choices or {})


def entered(output_dir: Path, *overrides: str) -> None:
    """`python train.py *overrides` by way of Hydra's entry; for a forked process, whose `sys.argv` is its own."""
    sys.argv = ["train.py", "--config-path", str(ROOT / "configs"), *overrides, f"paths.output_dir={output_dir}"]
    train.main()


def load(path: Path) -> dict:
    """A checkpoint, the safe way."""
    return torch.load(path, map_location="cpu", weights_only=True)
