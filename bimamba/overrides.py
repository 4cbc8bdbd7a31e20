"""What a checkpoint and a command line make together: a checkpoint's own configuration, and what was typed on top."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from omegaconf import DictConfig, OmegaConf

from bimamba.checkpoint import check_paths, check_targets, did_you_mean

# What a checkpoint decides at evaluation. The rest (logger, callbacks, paths, extras) belongs to the evaluation, and so
# does the trainer's placement: a checkpoint of eight GPUs is evaluated on a laptop.
EVALUATED = ("data", "model", "task", "trainer", "task_name", "tags", "seed", "monitor", "monitor_mode")
PLACEMENT = ("accelerator", "strategy", "devices", "num_nodes", "default_root_dir")
# What a resumed training does not take from its checkpoint.
OWN = ("paths", "extras", "stage", "ckpt_path", "explain", "export")
# Schedules whose saved state is the number of steps: their options may change.
OF_THE_STEP = ("bimamba.optim.cosine", "bimamba.optim.linear", "bimamba.optim.constant")
# Groups whose files are overrides of everything: they make a recipe, and a checkpoint has one already.
RECIPES = ("experiment", "ablation", "debug", "hparams_search")


def with_checkpoint(cfg: DictConfig, checkpoint: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """The configuration of a checkpoint plus what this command line adds.

    A group override (`trainer=cpu`) replaces that sub-tree, a dotted one (`data.batch_size=8`) that value. A training
    is resumed with everything it had; an evaluation takes data, model, task and trainer (less its placement). Another
    `seed` leaves the data's as it was, and so the splits: `data.seed` alone draws others.

    Args:
        cfg: as Hydra composed it from `overrides`.
        checkpoint: as read by `read_checkpoint`.
        overrides: of the command line.

    Raises:
        ValueError: an unknown key, an override that a checkpoint does not allow, or an untrusted target.
    """
    given = checkpoint["recipe"]
    typed = OverridesParser.create().parse_overrides(overrides=list(overrides))
    groups = [o for o in typed if _is_group(o)]
    _refuse_other_recipes(groups, checkpoint.get("choices", {}))
    keys = [k for k in given if k not in OWN] if cfg.stage == "fit" else [k for k in EVALUATED if k in given]
    check_targets({k: given[k] for k in keys}, extra=cfg.extras.trusted_modules)
    said = {o.key_or_group for o in typed}
    for key in {"callbacks", "logger", "trainer"} & set(keys) - said:  # what writes
        check_paths(given[key], key, said)

    # What a group override brings must be the group's own values, not those of the default experiment.
    others = [o.input_line for o in typed if o.key_or_group not in RECIPES and not o.key_or_group.startswith("hydra")]
    fresh = hydra.compose("train", ["~experiment", *(o for o in others if o)])
    merged: Any = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    for key in keys:
        merged[key] = given[key]
    if "seed" in said and "seed" in merged.data:
        merged.data.seed = OmegaConf.select(OmegaConf.create(dict(given)), "data.seed")  # it draws the splits
    if cfg.stage != "fit":
        for key in PLACEMENT:
            if key in fresh.trainer:
                merged.trainer[key] = _raw(fresh, f"trainer.{key}")
    for override in groups:
        if override.key_or_group not in RECIPES and override.key_or_group.split("/")[0] != "hydra":
            package = override.key_or_group.replace("/", ".")
            OmegaConf.update(merged, package, _raw(fresh, package), merge=False)
    for override in typed:
        if override not in groups and not override.key_or_group.startswith("hydra."):
            _apply(merged, override, checkpoint.get("choices", {}))
    if "monitor" in said and "monitor_mode" not in said:
        merged.monitor_mode = None  # the old metric's
    if cfg.stage == "fit":
        _refuse_another_optimizer(given, merged)
        _refuse_another_schedule(OmegaConf.create(dict(given)), merged)
        _warn_of_other_batches(checkpoint, merged)
    OmegaConf.set_struct(merged, True)
    return merged


def _refuse_another_optimizer(given: Mapping[str, Any], merged: DictConfig) -> None:
    """The optimizer's saved state brings its own rates and decays: others would be taken in silence, and do nothing."""
    before, now = _of_optimizer(given.get("task", {})), _of_optimizer(_raw(merged, "task"))
    for key in before | now:
        then, today, name = before.get(key), now.get(key), key.rpartition(".")[2]
        if then != today:
            raise ValueError(
                f"task.{key}={today}: a resumed training goes on with its optimizer as it was saved ({name}={then}); "
                "for another one begin a new training from the weights, by model.pretrained=CHECKPOINT"
            )


def _of_optimizer(task: Mapping[str, Any]) -> dict[str, Any]:
    """What of a task's options is in the optimizer's saved state."""
    options = {f"optimizer.{key}": value for key, value in (task.get("optimizer") or {}).items()}
    return options | {key: task.get(key) for key in ("layer_decay", "lr_scale")}


def _refuse_another_schedule(given: DictConfig, merged: DictConfig) -> None:
    """Nor may another kind of schedule take the state of this one; and the state of those that are not functions of the
    step holds their options: others would do nothing."""
    before, now = _of_schedule(given), _of_schedule(merged)
    for key in sorted(before | now, key=lambda key: key != "_target_"):  # the kind first
        if before.get(key) != now.get(key):
            raise ValueError(
                f"task.scheduler.{key}={now.get(key)}: a resumed training goes on with its schedule as it was saved "
                f"({key}={before.get(key)}); for another one begin a new training from the weights, by "
                "model.pretrained=CHECKPOINT"
            )


def _of_schedule(cfg: DictConfig) -> dict[str, Any]:
    """The schedule's kind, and what of its options is in its saved state."""
    node = OmegaConf.select(cfg, "task.scheduler")
    options: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else {}
    if options.get("_target_") in OF_THE_STEP:
        return {"_target_": options["_target_"]}
    return {key: value for key, value in options.items() if key != "mode"}  # follows from the metric


def _warn_of_other_batches(checkpoint: Mapping[str, Any], merged: DictConfig) -> None:
    """An epoch goes on behind as many batches as were done; others hold other rows."""
    sides = OmegaConf.create(dict(checkpoint["recipe"])), merged
    then, now = (OmegaConf.select(cfg, "data.batch_size") for cfg in sides)
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    done = 0 if progress.get("is_last_batch") else progress.get("current", {}).get("completed", 0)
    if done and then != now and isinstance(then, int) and isinstance(now, int | float):
        rank_zero_warn(
            f"data.batch_size={now}: the checkpoint was saved in mid-epoch, after {done} batches of {then} rows. This "
            f"epoch goes on behind {done} batches of {now}, so that it "
            f"{'leaves rows out' if now > then else 'has rows twice'}; the next ones are whole"
        )


def _is_group(override: Override) -> bool:
    loader = GlobalHydra.instance().config_loader()
    return bool(loader.get_group_options(override.key_or_group)) and isinstance(override.value(), str | list | None)


def _raw(cfg: DictConfig, key: str) -> Any:
    """A value, or a sub-tree as plain containers, with its references unresolved."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    raw = OmegaConf.to_container(node, resolve=False)
    return raw[leaf]  # type: ignore[index, call-overload]


def _refuse_other_recipes(groups: Sequence[Override], choices: Mapping[str, Any]) -> None:
    for override in groups:
        name, value = override.key_or_group, override.value()
        if name in RECIPES and value is not None and choices.get(name) != value:
            raise ValueError(
                f"{name}={value}: a checkpoint brings its own configuration (made with {name}={choices.get(name)}); "
                "leave it out and override single keys instead"
            )


def _apply(cfg: DictConfig, override: Override, choices: Mapping[str, Any]) -> None:
    key = override.key_or_group
    if override.is_delete():
        raise ValueError(f"~{key}: keys of a checkpoint's configuration cannot be deleted; set them to null")
    plain_add = override.is_add() and not override.is_force_add()
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    there = isinstance(node, DictConfig) and leaf in node
    if not (plain_add or there or _is_newer(key, node, choices)):
        known = flat_keys(cfg)
        raise ValueError(f"{key}: no such key in the checkpoint's configuration{did_you_mean(key, known)}")
    OmegaConf.update(cfg, key, override.value(), merge=True, force_add=True)


def _is_newer(key: str, node: Any, choices: Mapping[str, Any]) -> bool:
    """Whether today's files of the groups that a checkpoint chose know an option that it was made without."""
    parent, _, leaf = key.rpartition(".")
    files = [f"{g}={c}" for g, c in choices.items() if g.split("/")[0] in EVALUATED and isinstance(c, str)]
    try:
        today = OmegaConf.select(hydra.compose("train", ["~experiment", *files]), parent)
    except HydraException:  # a file of that name is no more
        return False
    both = isinstance(today, DictConfig) and isinstance(node, DictConfig)
    return both and leaf in today and today.get("_target_") == node.get("_target_")


def flat_keys(cfg: Any, prefix: str = "") -> list[str]:
    """Dotted names of all keys."""
    if isinstance(cfg, DictConfig):
        cfg = OmegaConf.to_container(cfg, resolve=False)
    if not isinstance(cfg, dict):
        return []
    keys = []
    for key, value in cfg.items():
        keys += [f"{prefix}{key}", *flat_keys(value, f"{prefix}{key}.")]
    return keys


def soften(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with `-m` before them all, and `++` before dotted overrides where a checkpoint is given.

    Python's argparse takes overrides from one side of `-m` alone: `python train.py hydra=submitit -m seed=1,2` would be
    an error.

    Hydra composes the defaults first and would refuse `data.max_length=…` for a checkpoint of sequences because the
    default data are images. `with_checkpoint` applies the same overrides again, and strictly. (`ckpt_path=auto` may
    find no checkpoint, so its command is that of a whole training, which Hydra checks.)
    """
    arguments = sorted(arguments, key=lambda a: a not in ("-m", "--multirun"))
    if not any(re.match(r"\+{0,2}ckpt_path=(?!(?:null|auto)$).", a) for a in arguments):
        return list(arguments)
    return [f"++{a}" if re.match(r"(?!(?:hydra|explain|paths|extras)\.)\w+\.[\w.]+=", a) else a for a in arguments]
