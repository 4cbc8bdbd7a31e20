"""A training step of an experiment's own model on a batch of its own data, for one or several values of an option.

    python benchmark/benchmark_experiment.py experiment=cifar10_patches data.path=FOLDER
    python benchmark/benchmark_experiment.py experiment=arabidopsis data.path=FOLDER --vary ablation=causal,tied

Arguments are those of train.py. A step is forward, loss, backward and AdamW under bf16 autocast, on one batch that was
augmented beforehand: eagerly and, on a GPU, as one CUDA graph, which `task.compile_options.mode=reduce-overhead` comes
near. Columns: parameters; median milliseconds; samples a second; on a GPU the peak of memory, all included.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_train import Step, seconds
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from scans import hardware, report
from torch import Tensor

from bimamba import config
from bimamba.spec import DataSpec

CONFIGS = Path(__file__).parents[1] / "configs"


def composed(overrides: list[str]) -> Any:
    """As train.py composes and checks it."""
    config.register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train.yaml", overrides=["paths.output_dir=/nowhere", *overrides])
    config.check(cfg)
    config.fit_options(cfg)
    return cfg


def first_batch(cfg: Any, device: str) -> tuple[DataSpec, dict[str, Any]]:
    """What the data are, and the first batch of a training, augmented."""
    torch.manual_seed(0)
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup("fit")
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in next(iter(data.train_dataloader())).items()}
    return data.spec, data.transform(batch, training=True)


def loss_of(task: Any, batch: dict[str, Any], device: str) -> Tensor:
    with torch.autocast(device.partition(":")[0], torch.bfloat16):
        return task.loss(task(batch), batch["label"]).mean()


def measure(value: str, cfg: Any, spec: DataSpec, batch: dict[str, Any], device: str, steps: int) -> dict[str, Any]:
    cuda = device.startswith("cuda")
    torch.manual_seed(0)
    net = instantiate(cfg.model)(spec=spec)
    task = instantiate(cfg.task)(net=net, spec=spec).to(device).train()
    row: dict[str, Any] = {"value": value, "parameters": sum(p.numel() for p in net.parameters())}
    for clock in ("eager", "graph") if cuda else ("eager",):
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = Step(task, partial(loss_of, task, batch, device), graph=clock == "graph")
        for _ in range(3):
            step()
        median = seconds(step, steps, cuda)
        row |= {f"{clock}, ms": 1e3 * median, f"{clock}, samples/s": len(batch["label"]) / median}
        if cuda and clock == "eager":  # a graph holds a pool of its own
            row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        step = None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="as of train.py: experiment=…, data.path=…")
    parser.add_argument("--vary", default="", help="KEY=VALUE,VALUE,…: one more override, a row for each value")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=15, help="timed steps, after three")
    parser.add_argument("--name", default="experiment", help="of the result files")
    a = parser.parse_args()
    key, _, values = a.vary.partition("=")
    rows, read = [], None
    for value in values.split(",") if values else [""]:
        varied = [f"{key}={value}"] if values else []
        cfg = composed([*a.overrides, *varied])
        if cfg.data != read:  # once, where the option is not of the data
            read = cfg.data
            spec, batch = first_batch(cfg, a.device)
        rows.append(measure(value, cfg, spec, batch, a.device, a.steps))
        print(rows[-1], flush=True)
    report(a.name, rows, "value", "", f"step of bf16 autocast, {' '.join(a.overrides)}, {hardware(a.device)}")


if __name__ == "__main__":
    main()
