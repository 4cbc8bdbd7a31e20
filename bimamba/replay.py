"""Repeats a step that was not finite: `python -m bimamba.replay logs/…/nonfinite/step_12.ckpt`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer

from bimamba.checkpoint import check_targets, checkpoint_spec, chosen_weights, load_weights, read_checkpoint
from bimamba.nonfinite import Finding, trace

KEY = "nonfinite"


def replay(
    path: str | Path, accelerator: str = "auto", trusted: Sequence[str] = ()
) -> tuple[Finding | None, torch.Tensor, dict[str, Any]]:
    """The saved batch through the saved weights, with the saved random states and precision.

    Args:
        path: a file of `callbacks.health`.
        accelerator: `auto`, `cpu` or `gpu`. trusted: further modules that its configuration may call.

    Returns:
        What is not finite, or None; the loss; and what was saved: `batch`, `step`, `found`.

    Raises:
        FileNotFoundError, ValueError: no such file, or not one of `callbacks.health`.
    """
    checkpoint = read_checkpoint(path, key="replay")
    if KEY not in checkpoint:
        raise ValueError(f"{path}: expected a file that callbacks.health wrote (nonfinite/step_….ckpt)")
    saved, config = checkpoint[KEY], checkpoint["config"]
    check_targets({k: config[k] for k in ("model", "task")}, extra=trusted)
    spec = checkpoint_spec(checkpoint)
    task: Any = instantiate(config["task"])(net=instantiate(config["model"])(spec=spec, pretrained=None), spec=spec)
    load_weights(task, chosen_weights(checkpoint, "raw"))
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "devices": 1}
    options["enable_progress_bar"] = False
    trainer = Trainer(accelerator=accelerator, precision=config["trainer"]["precision"], **options)
    device = trainer.strategy.root_device
    task = trainer.precision_plugin.convert_module(task).to(device).train()
    if task.distillation:
        task.distillation.place(trainer.precision_plugin, device, trusted)
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in saved["batch"].items()}
    torch.set_rng_state(saved["random"]["torch"])
    if device.type == "cuda" and "cuda" in saved["random"]:
        torch.cuda.set_rng_state(saved["random"]["cuda"], device)
    finding, loss = trace(task, batch, trainer.precision_plugin.forward_context)
    return finding, loss, saved


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is found; 0 where the step is not finite again, 1 where it is finite now, 2 for a wrong file."""
    parser = argparse.ArgumentParser(prog="python -m bimamba.replay", description=__doc__)
    parser.add_argument("path", help="logs/…/nonfinite/step_….ckpt")
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"))
    parser.add_argument("--trust", nargs="*", default=(), help="further modules that its configuration may call")
    given = parser.parse_args(arguments)
    try:
        finding, loss, saved = replay(given.path, given.accelerator, given.trust)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"step {saved['step']}, {len(saved['batch']['inputs'])} samples, loss {float(loss):.6g}")
    print(f"at the time: {saved['found']}")
    print(f"now:         {finding or 'everything is finite'}")
    return 0 if finding else 1


if __name__ == "__main__":
    sys.exit(main())
