"""Train, test, predict, explain: `python train.py [experiment=…] [group=…] [key=value …]`. See configs/ and README."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ModelSummary, ProgressBar
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from torch.distributed import get_world_size, is_initialized  # by name: cloudpickle (submitit) cannot send the package

from bimamba import config
from bimamba.allocator import keep_freed_memory
from bimamba.callbacks import SaveOnInterrupt, SetAside, StopOnInterrupt
from bimamba.checkpoint import checkpoint_spec, chosen_weights, load_weights, read_checkpoint
from bimamba.data.fingerprint import compare
from bimamba.export import export, record_evaluation
from bimamba.files import write_json
from bimamba.loggers import finish_wandb
from bimamba.overrides import soften, with_checkpoint
from bimamba.quiet import quiet
from bimamba.runs import claimed, locate
from bimamba.spec import DataSpec
from bimamba.strategies import take_over_ddp
from bimamba.sweeps import alone_again

FIRST_JOB = "BIMAMBA_FIRST_JOB"  # of a sweep, that a process takes part in

config.register_resolvers()
config.load_dotenv()
quiet()
take_over_ddp()


def train(cfg: DictConfig, overrides: Sequence[str] = (), choices: Mapping[str, Any] | None = None) -> dict[str, float]:
    """One run: fit (and test), test, predict, or explain.

    Args:
        cfg: as composed from configs/.
        overrides: of the command line; added to a checkpoint's own configuration.
        choices: which file was chosen of each group; saved in checkpoints.

    Returns:
        The metrics, `train/…`, `val/…`, `test/…`, `predict/…` or `explain/…`. Of a training they are the last epoch's;
        `val/…`, and the monitored one, are those of the epoch whose checkpoint is kept as the best and is tested.

    Raises:
        ValueError, FileNotFoundError: what the user gave cannot work; says what was expected.
    """
    cfg.ckpt_path = path = locate(cfg.ckpt_path, cfg.paths.log_dir, cfg.task_name, cfg.paths.output_dir)
    config.check(cfg)
    checkpoint = chosen_weights(read_checkpoint(path), cfg.weights) if path else None
    if checkpoint:
        cfg = with_checkpoint(cfg, checkpoint, overrides)
        cfg.ckpt_path = path
    config.settle_modes(cfg)
    config.fit_options(cfg)
    config.check_switches(cfg)
    with claimed(cfg.paths.output_dir, fresh=cfg.stage == "fit" and checkpoint is None, stage=cfg.stage):
        return run(cfg, checkpoint, choices)


def run(cfg: DictConfig, checkpoint: Mapping[str, Any] | None, choices: Mapping[str, Any] | None) -> dict[str, float]:
    """The run itself, in a folder of its own; arguments and result as of `train`."""
    plain, output_dir = config.resolved(cfg), Path(cfg.paths.output_dir)
    if cfg.extras.print_config:
        config.show(plain)
    settings = output_dir / "config.yaml"
    going_on = cfg.stage == "fit" and checkpoint is not None and settings.exists()
    if not going_on:  # else SetAside does, when it goes on indeed
        config.save(plain, settings)
    torch.set_float32_matmul_precision(cfg.extras.float32_matmul_precision)
    if cfg.seed is not None:  # 0 is a seed
        seed_everything(cfg.seed, workers=True)

    explanation: Any = instantiate(cfg.explain) if cfg.stage == "explain" else None
    if checkpoint and cfg.stage == "export":
        export(cfg, checkpoint)
        return {}
    datamodule: Any = instantiate(cfg.data)  # of bimamba.data: more than Lightning's own
    if checkpoint:
        datamodule.expect(checkpoint_spec(checkpoint))
    data_stage = config.data_stage(cfg)
    if data_stage != "predict":
        datamodule.prepare_data()
    datamodule.setup(data_stage)
    if data_stage != "predict":
        record(output_dir / "preflight.json", datamodule.preflight())
        if checkpoint:
            use = "resumed" if cfg.stage == "fit" else "evaluated"
            compare(checkpoint, datamodule.fingerprint, plain["data"], use)
    if cfg.stage == "fit":
        config.check_validation(cfg, datamodule.sizes["val"])
    spec = datamodule.spec
    record(output_dir / "spec.json", spec.to_dict())

    saved = {"config": plain, "recipe": config.recipe(cfg), "choices": dict(choices or {})}
    saved["splits"] = datamodule.fingerprint
    task: Any = make_task(cfg, spec, saved, checkpoint)
    if cfg.stage == "fit" and task.distillation:
        for teacher in task.distillation.read(cfg.extras.trusted_modules):
            compare(teacher.training, datamodule.fingerprint, plain["data"], "teacher", teacher.origin)
    callbacks = make_callbacks(cfg)
    if going_on:
        callbacks.append(SetAside(cfg.paths.output_dir, cfg.paths.plot_dir, plain))
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=make_loggers(cfg))
    if is_initialized() and (started := get_world_size()) != trainer.world_size:
        raise ValueError(
            f"a sweep whose group has {started} processes by now: expected as many in each job that follows, got "
            f"{trainer.world_size}; run the others in a sweep of their own"
        )
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    for logger in trainer.loggers:
        logger.log_hyperparams(plain)

    metrics: dict[str, float] = {}
    if cfg.stage == "fit":
        metrics |= earlier(output_dir) if checkpoint else {}
        trainer.fit(task, datamodule=datamodule, ckpt_path=cfg.ckpt_path, weights_only=True)
        metrics |= numbers(trainer.callback_metrics) | best_score(trainer)
        if cfg.test and datamodule.sizes["test"]:
            best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
            if best and isinstance(trainer.strategy, FSDPStrategy):  # what is sharded cannot be set up once more
                task, best = make_task(cfg, spec, saved, read_checkpoint(best)), None
            trainer.test(task, datamodule=datamodule, ckpt_path=best, weights_only=True, verbose=False)
            metrics |= numbers(trainer.callback_metrics)
    elif cfg.stage == "test":
        assert checkpoint is not None  # config.check
        trainer.test(task, datamodule=datamodule, verbose=False)
        metrics |= numbers(trainer.callback_metrics)
        record_evaluation(output_dir, checkpoint, plain, metrics)
    elif cfg.stage == "explain":
        metrics |= explanation(task, datamodule, trainer, output_dir, Path(cfg.paths.plot_dir))
    else:
        trainer.predict(task, datamodule=datamodule, return_predictions=False)
        metrics |= task.predict_metrics
    record(output_dir / "metrics.json", metrics)
    config.show_results(metrics, output_dir, cfg.stage)
    return metrics


def make_task(
    cfg: DictConfig, spec: DataSpec, saved: Mapping[str, Any], checkpoint: Mapping[str, Any] | None
) -> LightningModule:
    """The task with its network, and with the checkpoint's weights where there is one.

    A checkpoint brings all weights: what its training started from is not needed any more.
    """
    net = instantiate(cfg.model)(spec=spec, **({"pretrained": None} if checkpoint else {}))
    task: Any = instantiate(cfg.task)(net=net, spec=spec, checkpoint_extras=dict(saved))
    if checkpoint:
        load_weights(task, checkpoint)
    return task


def make_callbacks(cfg: DictConfig) -> list[Callback]:
    """The callbacks, without those that the trainer's switches, or the lack of a logger, turn off."""
    off = {
        Checkpoint: not cfg.trainer.enable_checkpointing or bool(cfg.trainer.fast_dev_run),  # 2.6 leaves last.ckpt
        ProgressBar: not cfg.trainer.enable_progress_bar,
        ModelSummary: not cfg.trainer.enable_model_summary,
        LearningRateMonitor: not config.parts(cfg.logger),
    }
    callbacks = [instantiate(c) for c in config.parts(cfg.callbacks)]
    callbacks = [c for c in callbacks if not getattr(c, "off", False)]
    if off[Checkpoint]:
        callbacks = [StopOnInterrupt() if isinstance(c, SaveOnInterrupt) else c for c in callbacks]
    return [c for c in callbacks if not any(isinstance(c, kind) and switch for kind, switch in off.items())]


def make_loggers(cfg: DictConfig) -> list[Any] | bool:
    """The loggers; False for none, as Lightning wants it."""
    return [instantiate(c) for c in config.parts(cfg.logger)] or False


def earlier(output_dir: Path) -> dict[str, float]:
    """What this folder's training has measured: one that had ended before it was resumed measures nothing again."""
    path = output_dir / "metrics.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return {key: value for key, value in found.items() if not key.startswith("test/")}


def best_score(trainer: Trainer) -> dict[str, float]:
    """The validation's metrics at the best epoch, which is the one of the checkpoint that is tested."""
    callback: Any = trainer.checkpoint_callback
    if kept := getattr(callback, "best_metrics", {}):
        return dict(kept)
    score = getattr(callback, "best_model_score", None)  # Lightning's own callback, or an earlier version's training
    return {callback.monitor: float(score)} if score is not None and callback.monitor else {}


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Logged values as plain floats."""
    return {key: float(value) for key, value in metrics.items()}


@rank_zero_only
def record(path: Path, values: Mapping[str, Any]) -> None:
    """A small JSON file of the run; all its processes hold the same values, and the first one writes them."""
    write_json(path, values)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Hydra's entry; returns `optimized_metric` to a sweeper."""
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:
        # Lightning starts a job's other processes by this command line, and they go on through the sweep: in its
        # folder, not in one of their own, and from that job on
        if "LOCAL_RANK" not in os.environ:
            sys.argv.append(f'hydra.sweep.dir="{job.sweep.dir}"')
            os.environ[FIRST_JOB] = str(job.job.num)
        elif job.job.num < int(os.environ.get(FIRST_JOB, 0)):
            return None
    try:
        with config.clear_errors(sweeping=job.mode == RunMode.MULTIRUN), alone_again():
            metrics = train(cfg, job.overrides.task, job.runtime.choices)
            return config.optimized(metrics, cfg.optimized_metric)
    finally:
        finish_wandb()


if __name__ == "__main__":
    config.check_plugins(sys.argv[1:])
    sys.argv[1:] = soften(sys.argv[1:])
    main()
