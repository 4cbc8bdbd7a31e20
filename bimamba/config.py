"""A run's configuration: its checks, its plain forms, the folder that it writes to, its printing, its errors."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.experimental.callback import Callback
from hydra.utils import get_object
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch.distributed import TCPStore

from bimamba.checkpoint import has_resolver
from bimamba.collect import flatten
from bimamba.files import make_folder
from bimamba.runs import find_checkpoint, quoted
from bimamba.tasks.metrics import LARGE_IS_BETTER, SMALL_IS_BETTER, mode_of

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = ("fit", "test", "predict", "explain", "export")
WORDS = ("yes", "no", "on", "off")  # true and false in YAML, text to Hydra


# ----------------------------------------------------------------------------------------------------- before anything


def load_dotenv() -> None:
    """Put the variables of `.env` into the environment, where python-dotenv is installed."""
    try:
        from dotenv import load_dotenv as load
    except ModuleNotFoundError:
        return  # optional: the shell's own environment serves as well
    load(".env")


def check_plugins(arguments: Sequence[str]) -> None:
    """Say what to install before Hydra says that it does not know `optuna`.

    Raises:
        SystemExit: the search needs a package that is not installed.
    """
    wants = any(re.match(r"\+{0,2}(hparams_search|hydra/sweeper)=optuna", a) for a in arguments)
    if wants and not _has_plugin("hydra_optuna_sweeper"):
        raise SystemExit("error: hparams_search=optuna needs a package: pip install hydra-optuna-sweeper")
    wants = any(re.match(r"hydra=submitit|hydra/launcher=submitit_", a) for a in arguments)
    if wants and not _has_plugin("hydra_submitit_launcher"):
        raise SystemExit("error: hydra=submitit (Slurm) needs a package: pip install hydra-submitit-launcher")


def _has_plugin(name: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{name}") is not None
    except ModuleNotFoundError:  # not one plugin is there
        return False


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration before anything is read.

    Raises:
        ValueError: an unknown stage, a missing checkpoint or file, a choice of model by the test set.
    """
    if cfg.stage not in STAGES:
        raise ValueError(f"stage: expected one of {', '.join(STAGES)}, got {cfg.stage!r}")
    if cfg.stage != "fit" and not cfg.ckpt_path:
        raise ValueError(f"stage={cfg.stage} needs a checkpoint: ckpt_path=logs/…/checkpoints/best.ckpt")
    if cfg.stage == "predict" and not OmegaConf.select(cfg, "data.predict"):
        raise ValueError("stage=predict needs something to predict: data.predict=FILE (or a folder)")
    if cfg.stage == "explain" and data_stage(cfg) == "predict" and not OmegaConf.select(cfg, "data.predict"):
        raise ValueError("explain.split=predict needs something to explain: data.predict=FILE (or a folder)")
    for key in ("monitor", "optimized_metric"):
        if str(cfg[key]).startswith("test/"):
            raise ValueError(f"{key}={cfg[key]}: the test set must not choose the model; monitor a val/ metric")


def settle_modes(cfg: DictConfig) -> None:
    """Say of every monitored metric whether it should become small or large: `monitor_mode`, and the `mode` of a
    callback or schedule that was given a metric of its own.

    An evaluation chooses nothing any more, and takes what its checkpoint says.

    Raises:
        ValueError: a mode that contradicts the metric, or none for a metric of another name than the tasks'.
    """
    strict = cfg.stage == "fit"
    cfg.monitor_mode = _settled("monitor", cfg.monitor, "monitor_mode", cfg.monitor_mode, strict)
    for path, part in _monitors(cfg):
        if "mode" in part:
            follows = OmegaConf.is_interpolation(part, "mode")
            if not (follows and part.monitor == cfg.monitor):
                mode = None if follows else part.mode
                part.mode = _settled(f"{path}.monitor", part.monitor, f"{path}.mode", mode, strict)


def _settled(key: str, metric: str | None, mode_key: str, mode: str | None, strict: bool) -> str:
    if mode not in (None, "min", "max"):
        raise ValueError(f"{mode_key}: expected min, max or null (by the metric's name), got {mode!r}")
    known = mode_of(metric) if metric else "min"  # without a metric there is nothing to compare
    if strict and metric and mode and known and mode != known:
        raise ValueError(
            f"{mode_key}={mode}: {key} is {metric}, and its best value is the "
            f"{'smallest' if known == 'min' else 'largest'}; expected {known}, or null (by the metric's name)"
        )
    if mode is None and known is None:
        names = ", ".join(sorted(SMALL_IS_BETTER | LARGE_IS_BETTER))
        raise ValueError(
            f"{key}: expected a metric that a task makes (val/… of {names}), or beside another one {mode_key}=min "
            f"(small values are better) or max, got {metric}"
        )
    return str(mode or known)


def check_validation(cfg: DictConfig, rows: int) -> None:
    """Refuse a callback or schedule that waits for a figure of a validation that there is not. (Without one, the last
    checkpoint counts as the best.)

    Args:
        rows: of the validation set.

    Raises:
        ValueError: such a part; Lightning would stop at the end of the first epoch, or the rate never fall.
    """
    if rows and cfg.trainer.get("limit_val_batches") != 0:
        return
    for path, part in _monitors(cfg):
        kind = _target(part, path)
        keeps = inspect.isclass(kind) and issubclass(kind, Checkpoint)
        if not keeps and part.monitor.startswith("val/"):
            raise ValueError(
                f"{path}.monitor={part.monitor}: expected a validation, and there is none (data.val_fraction=0, or "
                "trainer.limit_val_batches=0); give it rows, or leave this part out"
            )


def fit_options(cfg: DictConfig) -> None:
    """Leave out options of a part of the model, or of the optimizer, that this part does not have but another choice of
    its group has, and say so: an experiment sets `model.embedding.patch_size`, and `model/embedding=pixels` is typed on
    top of it.

    Raises:
        ValueError: an option that no choice of the group has.
    """
    optimizer = cfg.task.get("optimizer")
    strange = [*_strange_options(cfg.model, "model"), *_strange_options(optimizer, "task.optimizer")]
    for key, target, taken in strange:
        parent, _, name = key.rpartition(".")
        files = (CONFIGS / parent.replace(".", "/")).glob("*.yaml")
        if not any(name in OmegaConf.load(file) for file in files):
            raise ValueError(f"{key}: expected an option that {target} takes ({taken}), got {name!r}")
        with open_dict(cfg):
            del OmegaConf.select(cfg, parent)[name]
        rank_zero_info(f"note: {key} is left out: it was set for another choice, and {target} has no such option")


def _own(node: DictConfig) -> list[str]:
    """Keys with a value of their own: neither missing nor a reference to another."""
    return [k for k in map(str, node) if not (OmegaConf.is_missing(node, k) or OmegaConf.is_interpolation(node, k))]


def _parts(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """A configuration and all that lies in it, each with its key."""
    if isinstance(node, DictConfig):
        yield path, node
        for key in _own(node):
            yield from _parts(node[key], f"{path}.{key}")


def _targets(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """Each part of a configuration that has a `_target_`, with its key."""
    return ((where, part) for where, part in _parts(node, path) if part.get("_target_") is not None)


def _monitors(cfg: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Callbacks and schedules that follow a metric, with their keys."""
    for section in ("callbacks", "task"):
        for path, part in _targets(cfg[section], section):
            if isinstance(part.get("monitor"), str):
                yield path, part


def _target(part: DictConfig, path: str) -> Any:
    """The class or function that a part of the configuration names.

    Raises:
        ValueError: there is none.
    """
    try:
        return get_object(part["_target_"])
    except ImportError as error:
        raise ValueError(f"{path}._target_: {error}") from error


def _strange_options(node: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Options that no part takes: key, part, and what it takes."""
    for where, part in _targets(node, path):
        taken = inspect.signature(_target(part, where)).parameters.values()
        names = [p.name for p in taken if p.kind is not p.VAR_KEYWORD]
        if len(names) == len(taken):
            for key in map(str, part):
                if not key.startswith("_") and key not in names:
                    yield f"{where}.{key}", part["_target_"], ", ".join(names)


def check_switches(cfg: DictConfig) -> None:
    """Refuse words where a switch is meant: `no` and `off` are text to Hydra, and any text counts as true.

    Any text is refused where the part that takes an option declares it as a switch; these words wherever it does not
    say that it takes text: among its `**options`, in a table of settings, beside named choices (`bool | Literal["x"]`).
    Text is refused too where a part declares numbers alone, and a fraction where these are whole.

    Raises:
        ValueError: a switch that is neither true nor false, or no number where one is meant.
    """
    defaults: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "train.yaml"), resolve=False)
    for key in (key for key, value in flatten(defaults).items() if isinstance(value, bool)):
        _expect_switch(key, OmegaConf.select(cfg, key), {"bool"})
    sections = ("data", "model", "task", "trainer", "callbacks", "logger")
    for section in (*sections, "explain") if cfg.stage == "explain" else sections:
        for path, part in _parts(cfg[section], section):
            kinds = _kinds_of_arguments(_target(part, path)) if part.get("_target_") is not None else {}
            for key in _own(part):
                _expect_switch(f"{path}.{key}", part[key], kinds.get(key, {"bool", "unknown"}))
                _expect_number(f"{path}.{key}", part[key], kinds.get(key, set()))


def _expect_switch(key: str, value: Any, kinds: set[str]) -> None:
    if not isinstance(value, str) or "bool" not in kinds or "str" in kinds:
        return
    choices = kinds - {"bool", "None", "NoneType"}
    if not choices or (value.lower() in WORDS and not any(repr(value) in c.replace('"', "'") for c in choices)):
        raise ValueError(f"{key}: expected true or false, got {value!r}")


def _expect_number(key: str, value: Any, kinds: set[str]) -> None:
    numbers = kinds - {"None", "NoneType", "Tensor"}  # a rate may be a tensor; no configuration holds one
    if not numbers or numbers - {"int", "float"}:
        return
    if isinstance(value, str):
        raise ValueError(f"{key}: expected a number, got {value!r}")
    if numbers == {"int"} and isinstance(value, float) and value % 1:
        raise ValueError(f"{key}: expected a whole number, got {value}")


def _kinds_of_arguments(target: Any) -> dict[str, set[str]]:
    """Types of each argument; of a class also those of its ancestors, to which it hands on the rest."""
    classes = inspect.getmro(target)[::-1] if inspect.isclass(target) else ()
    ways = [vars(c)["__init__"] for c in classes if "__init__" in vars(c)] or [target]
    given = [p for way in ways for p in inspect.signature(way).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return {p.name: _kinds(p.annotation) for p in given}


def _kinds(annotation: Any) -> set[str]:
    if isinstance(annotation, str):
        return {part.strip() for part in annotation.split("|")}
    kinds = (annotation,) if get_origin(annotation) is Literal else get_args(annotation) or (annotation,)
    return {kind.__name__ if isinstance(kind, type) else str(kind) for kind in kinds}


def data_stage(cfg: DictConfig) -> str:
    """The stage whose data a run reads: `explain` has none of its own."""
    if cfg.stage != "explain":
        return cfg.stage
    return "predict" if cfg.explain.split == "predict" else "test"


# ---------------------------------------------------------------------------------------------------------- plain forms


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The whole configuration as plain containers, every reference replaced by its value.

    Raises:
        omegaconf.MissingMandatoryValue: a value that the user has to give (`???`) is missing.
    """
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def recipe(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain containers that still refer to each other (`${seed}`), for later overrides.

    References through a resolver (`${oc.env:…}`) are replaced by their values: whoever loads the recipe from a
    checkpoint must not have to trust resolvers.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    return _without_resolvers(raw, OmegaConf.to_container(cfg, resolve=True))


def _without_resolvers(raw: Any, values: Any) -> Any:
    if isinstance(raw, dict):
        return {k: _without_resolvers(v, values[k]) for k, v in raw.items()}
    if isinstance(raw, list):
        return [_without_resolvers(v, w) for v, w in zip(raw, values, strict=True)]
    return values if isinstance(raw, str) and has_resolver(raw) else raw


# ----------------------------------------------------------------------------------------------------- the run's folder


def run_folder(ckpt_path: str | Path) -> Path | None:
    """Folder of the run that wrote a checkpoint (`<run>/checkpoints/x.ckpt`), or None for a checkpoint on its own."""
    folder = Path(ckpt_path).absolute().parent
    if folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file():
        return folder.parent
    return None


def _stamp() -> str:
    """The time that names a run's folder.

    torchrun's processes may begin in different seconds, and two names would be two folders: all take the time of
    whichever was first, from the store that torchrun keeps for them.
    """
    now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return now
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"bimamba/stamp/{os.environ['TORCHELASTIC_RESTART_COUNT']}"  # started again after a failure: another run
    return store.compare_set(key, "", now).decode()


def _output_dir(stage: str, ckpt_path: str | None, log_dir: str, task_name: str, stamp: str) -> str:
    """Where a run writes: a resumed training into its own folder, an evaluation into a folder beneath it."""
    run = _run_of(ckpt_path, log_dir, task_name)
    if run and stage == "fit":
        return str(run)
    if run and os.access(run, os.W_OK):
        return str(run / stage / stamp)
    return str(Path(log_dir) / (task_name if stage == "fit" else stage) / "runs" / stamp)


def _run_of(ckpt_path: str | None, log_dir: str, task_name: str) -> Path | None:
    found = find_checkpoint(ckpt_path, log_dir, task_name) if ckpt_path in ("last", "best") else ckpt_path
    return run_folder(found) if found else None


def _hydra_dir(stage: str, ckpt_path: str | None, log_dir: str, task_name: str) -> str:
    """A resumed training must not overwrite what Hydra wrote when it began, nor an evaluation that was given a
    training's folder and will be refused there."""
    if stage != "fit":
        return f".hydra/{stage}_{_stamp()}"
    if ckpt_path == "auto" or _run_of(ckpt_path, log_dir, task_name):
        return f".hydra/resumed_{_stamp()}"
    return ".hydra"


def _tasks(devices: Any, accelerator: str | None = None) -> int | None:
    """Processes, or with an accelerator GPUs (None: does not need any), that a node of Slurm's has to provide."""
    if accelerator == "cpu":
        return None
    if isinstance(devices, ListConfig | list | tuple):
        return len(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    raise ValueError(
        f"hydra=submitit: Slurm must be told how many processes a node starts, and trainer.devices={devices} does not "
        "say it; give the number of GPUs of a node, for instance trainer.devices=4"
    )


class OutputFolder(Callback):
    """Of Hydra (configs/hydra): makes the folder of a run, or of a sweep, before Hydra does, which shows a stack trace
    where it cannot be made."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._make(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._make(config, "hydra.sweep.dir")

    def _make(self, config: DictConfig, key: str) -> None:
        HydraConfig.instance().set_config(config)  # as Hydra does before it makes the folder, for ${hydra:…}
        with clear_errors():
            make_folder(Path(OmegaConf.select(config, key)), f"{key} (by default beneath paths.log_dir)")


def _direction(metric: str | None, monitor: str, mode: str | None) -> str:
    """Which way Optuna goes: that of the metric that a trial returns, whatever else chooses its checkpoint."""
    own = mode if metric in (None, monitor) else None
    goal = _settled("optimized_metric", metric or monitor, "hydra.sweeper.direction", own, strict=False)
    return {"min": "minimize", "max": "maximize"}[goal]


def register_resolvers() -> None:
    """`${run_dir:…}`, `${hydra_dir:…}`, `${stamp:}` and `${tasks:…}` of configs/hydra, `${direction:…}` of Optuna's.

    None evaluates code.
    """
    OmegaConf.register_new_resolver("run_dir", _output_dir, replace=True)
    OmegaConf.register_new_resolver("stamp", _stamp, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("tasks", _tasks, replace=True)
    OmegaConf.register_new_resolver("direction", _direction, replace=True)
    OmegaConf.register_new_resolver("hydra_dir", _hydra_dir, replace=True, use_cache=True)


# ---------------------------------------------------------------------------------------------------- printing, errors


@rank_zero_only
def show(config: Mapping[str, Any]) -> None:
    """Print the configuration as a tree."""
    from rich import print as rich_print
    from rich.syntax import Syntax
    from rich.tree import Tree

    tree = Tree("configuration", guide_style="dim")
    for key, value in config.items():
        if isinstance(value, dict | list) and value:
            text = OmegaConf.to_yaml(OmegaConf.create(value)).rstrip()
            tree.add(f"[bold]{key}").add(Syntax(text, "yaml", background_color="default"))
        else:
            tree.add(f"[bold]{key}[/]: {value}")
    rich_print(tree)


@rank_zero_only
def save(config: Mapping[str, Any], path: Path) -> None:
    """Write the resolved configuration as YAML; an earlier one of the same run is kept beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path = path.with_name(f"{path.stem}_{datetime.now():%Y-%m-%d_%H-%M-%S}{path.suffix}")
    OmegaConf.save(OmegaConf.create(dict(config)), path)


class JobFailed(CompactHydraException):
    """A job of a sweep ended with an error that has been printed: Hydra goes on with the others, and then fails."""


@contextmanager
def clear_errors(sweeping: bool = False) -> Iterator[None]:
    """What a user did wrong ends in one message, not in a stack trace; `HYDRA_FULL_ERROR=1` shows the trace.

    Args:
        sweeping: this is one job of several, and the others should not end with it.
    """
    try:
        yield
    except (
        ValueError,
        OSError,
        FloatingPointError,
        OmegaConfBaseException,
        InstantiationException,
        MisconfigurationException,
    ) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        cause: BaseException = error
        key = getattr(error, "full_key", None)
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            match = re.search(r"full_key: (\S+)", str(cause))
            key, cause = match.group(1) if match else key, cause.__cause__
        if isinstance(error, InstantiationException) and not isinstance(
            cause, ValueError | OSError | InstantiationException | ModuleNotFoundError | MisconfigurationException
        ):
            raise  # not the user's doing: the whole trace
        where = f" (in {key})" if key and str(key) not in str(cause) else ""
        message = f"error: {cause}{where}\nHYDRA_FULL_ERROR=1 shows where it was raised."
        if not sweeping:
            raise SystemExit(message) from None
        print(message, file=sys.stderr, flush=True)
        raise JobFailed(f"error: a job of this sweep failed: {cause}{where}") from None


def parts(node: Any) -> list[Any]:
    """The values of a group of named parts (callbacks, loggers), without those set to null."""
    if not node:
        return []
    values = node.values() if isinstance(node, DictConfig | dict) else list(node)
    return [v for v in values if isinstance(v, DictConfig | ListConfig | dict)]


def optimized(metrics: Mapping[str, float], name: str | None) -> float | None:
    """The value a sweeper asked for.

    Raises:
        ValueError: no such metric; names those there are.
    """
    if name is None:
        return None
    if name not in metrics:
        raise ValueError(f"optimized_metric: no {name!r} was logged; there are {', '.join(sorted(metrics))}")
    return metrics[name]


@rank_zero_only
def show_results(metrics: Mapping[str, float], output_dir: Path, stage: str) -> None:
    """Print the figures of the last stage, and where everything is."""
    from rich.console import Console
    from rich.table import Table

    prefix = next((p for p in ("explain/", "predict/", "test/", "val/") if any(k.startswith(p) for k in metrics)), "")
    table = Table(title=f"{prefix.rstrip('/')} metrics" if prefix else None)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key in sorted(k for k in metrics if prefix and k.startswith(prefix)):
        table.add_row(key.removeprefix(prefix), f"{metrics[key]:.4f}")
    console = Console()
    if prefix:
        console.print(table)
    best = output_dir / "checkpoints" / "best.ckpt"
    console.print(f"Results in {output_dir}", highlight=False, soft_wrap=True)
    if stage == "fit" and best.exists():
        command = f"python train.py stage=test ckpt_path={quoted(best)}"
        console.print(f"Evaluate with: {command}", highlight=False, soft_wrap=True, markup=False)
