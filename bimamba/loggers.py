"""Loggers: Weights & Biases that needs no account, and that finds its run again."""

from __future__ import annotations

import netrc
import os
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import loggers
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

STEP = "trainer/global_step"  # the axis of every chart
SECTIONS = (
    "train",
    "val",
    "test",
    "performance",
    "model",
    "samples",
    "explain",
)  # of a dashboard: what stands before /
LOWER_IS_BETTER = ("loss", "loss_step", "perplexity", "calibration_error", "mse", "mae")
# Overrides that say nothing of what a run learns.
UNNAMED = ("paths", "hydra", "logger", "extras", "stage", "ckpt_path", "experiment", "task_name", "tags", "explain")
LONGEST_NAME = 128  # W&B's limit


def summary_of(name: str) -> str | None:
    """What of a metric's history a run's summary shows: its best value, the mean of a rate, or None, the last value.

    A test happens once, after the training: its value is the last one. Learning rates and norms have no best.
    """
    section, _, rest = name.partition("/")
    if section == "performance":
        return "mean"
    if section == "val" or name in ("train/loss", "train/loss_step", "train/accuracy"):
        return "min" if rest in LOWER_IS_BETTER else "max"
    return None


def run_name(task_name: str | None, stage: str | None, overrides: Sequence[str]) -> str | None:
    """`digits test model.depth=2 seed=1`: experiment, stage unless it is a training, and what the command line changed.

    None, a name that W&B invents, where nothing of this is known.
    """
    told = [o.lstrip("+~") for o in overrides if not o.lstrip("+~").startswith(UNNAMED)]
    parts = [task_name, stage if stage != "fit" else None, *told]
    name = " ".join(p for p in parts if p)
    return (name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…") or None


def logged_in() -> bool:
    """Whether `wandb` has a key for its host: in the environment or in a netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    if given := os.environ.get("WANDB_BASE_URL"):
        hosts = [given]
    else:  # W&B has changed its own host between versions; it takes the old one's key for the new one too
        import wandb

        hosts = [wandb.Settings().base_url, "https://api.wandb.ai"]
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        if name and (path := Path(name).expanduser()).is_file():
            try:
                known = netrc.netrc(path)
                return any(known.authenticators(urlparse(host).netloc) is not None for host in hosts)
            except netrc.NetrcParseError:
                return False
    return False


class WandbLogger(loggers.WandbLogger):
    """Lightning's logger, offline where nobody is logged in.

    An offline run loses nothing: `wandb sync <run folder>/wandb/offline-run-*` uploads it later (all parts of a resumed
    training at once, in the order of their start). The run's id is kept in `<save_dir>/wandb/run_id`, so a training
    resumed in the same folder continues the same W&B run.

    Metrics are arranged by what stands before the slash (`SECTIONS`), over `trainer/global_step`; a run's summary shows
    the best value of each validation metric, not the last one (`summary_of`).

    Args:
        save_dir: the run's folder.
        mode: `online`, `offline`, `disabled`, `shared`, or None: `WANDB_MODE` if set, else online with an account and
            offline without.
        log_model: save the best checkpoint as an artifact at the end (True) or each one (`all`); works offline too.
        name: of the run; None: see `run_name`.
        log_code: keep the package, the configurations and train.py as an artifact of type code.
        options: further arguments of `wandb.init` (project, group, tags, …).

    Raises:
        ValueError: an unknown mode; at its first use: W&B refuses the run, or cannot be reached.
    """

    def __init__(
        self,
        save_dir: str,
        mode: str | None = None,
        log_model: Literal["all"] | bool = False,
        id: str | None = None,
        name: str | None = None,
        log_code: bool = False,
        **options: Any,
    ) -> None:
        modes = ("online", "offline", "disabled", "shared")
        mode = mode or os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # names that older versions of wandb used
        if mode not in modes:
            raise ValueError(f"logger.wandb.mode: expected one of {', '.join(modes)}, or null, got {mode!r}")
        self.mode, self.log_code = mode, log_code
        self._defined: set[str] = set()
        if name is None:
            overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
            name = run_name(options.get("group"), options.get("job_type"), overrides)
        # `offline=` of Lightning's logger would refuse log_model and set an environment variable for good.
        options |= {"id": id or _run_id(Path(save_dir)), "name": name, "mode": mode}
        super().__init__(save_dir=save_dir, log_model=log_model, **options)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; its first use begins it, lays out its sections and keeps the code."""
        import wandb

        begun = self._experiment is not None
        try:
            run = super().experiment
        except wandb.Error as error:  # no account, no network, no such entity
            raise ValueError(f"logger.wandb: {error} Or train with logger.wandb.mode=offline.") from error
        if not begun and self.mode != "disabled":
            for section in SECTIONS:
                run.define_metric(f"{section}/*", step_metric=STEP, step_sync=True)
            run.define_metric("epoch", hidden=True)  # an axis, not a result
            if self.log_code:
                _keep_code(run)
        return run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs, after saying what the summary of each new metric shows."""
        for name, value in metrics.items():
            if name not in self._defined and isinstance(value, int | float) and self.mode != "disabled":
                self._defined.add(name)
                if summary := summary_of(name):
                    self.experiment.define_metric(name, step_metric=STEP, step_sync=True, summary=summary)
        super().log_metrics(metrics, step)


def _keep_code(run: Any) -> None:
    """This project's source, as an artifact. What else lies beside the package, data and logs, stays out."""
    root = Path(__file__).parents[1]
    files = [*(root / "bimamba").rglob("*.py"), *(root / "configs").rglob("*.yaml"), root / "train.py"]
    with tempfile.TemporaryDirectory() as folder:  # W&B would walk through the root with all that lies there
        for path in (f for f in files if f.is_file()):
            copy = Path(folder) / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
        run.log_code(root=folder, include_fn=lambda path: True)


def _run_id(save_dir: Path) -> str:
    path = save_dir / "wandb" / "run_id"
    if path.is_file():
        return path.read_text().strip()
    run_id = secrets.token_hex(4)  # as long as W&B's own
    if getattr(rank_zero_only, "rank", 0) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id + "\n")
    return run_id


def tensorboard(**options: Any) -> loggers.TensorBoardLogger:
    """Lightning's TensorBoard logger.

    Raises:
        ValueError: no TensorBoard package is installed.
    """
    try:
        return loggers.TensorBoardLogger(**options)
    except ModuleNotFoundError as error:
        raise ValueError("logger=tensorboard needs a package that is not here: pip install tensorboard") from error


def wandb_loggers(trainer: Any) -> list[loggers.WandbLogger]:
    """The W&B loggers of a trainer; their media functions work on rank zero only."""
    return [logger for logger in trainer.loggers if isinstance(logger, loggers.WandbLogger)]


def finish_wandb() -> None:
    """Close the W&B run of this process, so that the next job of a sweep gets a run of its own."""
    import sys

    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
