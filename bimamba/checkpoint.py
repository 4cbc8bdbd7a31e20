"""Checkpoints of unknown origin: read without running code, checked, and put into a network with clear errors."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import pickle
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bimamba.spec import DataSpec

# Of a run's data: the options that say which data these are, and those that decide which of their rows are whose.
IDENTITY = ("_target_", "source", "path", "task")
DRAWN_BY = ("seed", "val_fraction", "test_fraction", "num_folds", "fold", "fold_role", "val_records", "test_records")

# Where a configuration that came with a checkpoint may take its classes and functions from.
TRUSTED = (
    # by room: what lies outside of them (bimamba.config.save, for one) writes files
    "bimamba.atomic.",
    "bimamba.callbacks.",
    "bimamba.data.",
    "bimamba.loggers.",
    "bimamba.models.",
    "bimamba.nn.",
    "bimamba.optim.",
    "bimamba.strategies.",
    "bimamba.tasks.",
    "torch.optim.",
    "torchmetrics.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.plugins.",
    "lightning.pytorch.profilers.",
    "lightning.pytorch.strategies.",
    "lightning.pytorch.trainer.trainer.Trainer",
)
# Elsewhere only classes may be called: a function of a room may do more than make an object.
FUNCTIONS = ("bimamba.loggers.", "bimamba.optim.")
_OUTSIDE = re.compile(r"^[/\\~]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.($|[/\\])")
_ALIASES = {"lightning.pytorch.Trainer": "lightning.pytorch.trainer.trainer.Trainer"}


def read_checkpoint(path: str | Path, key: str = "ckpt_path") -> dict[str, Any]:
    """Load a checkpoint of this project on the CPU, under `weights_only=True`: a file cannot run code.

    Args:
        path: the file.
        key: the option that named it, for messages.

    Returns:
        The checkpoint's dict; `state_dict`, `spec` and `recipe` are there.

    Raises:
        FileNotFoundError: no such file; names checkpoints nearby.
        ValueError: not a checkpoint, a damaged one, one that asks to run code, or one of another program.
    """
    path = Path(path)
    if not path.is_file():
        places = (path, path / "checkpoints") if path.is_dir() else (path.parent,)
        near = [file for place in places for file in sorted(place.glob("*.ckpt"))]
        hint = f"; there is {', '.join(map(str, near))}" if near else ""
        what = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{key}: expected a checkpoint file, got {path} ({what}){hint}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{key}: {path} is no checkpoint that can be loaded safely: it is damaged or holds more than weights "
            f"and plain values, which could run code ({reason})"
        ) from error
    except Exception as error:  # what the readers of zip and pickle make of any other bytes has no end
        reason = str(error).split("\n")[0]
        raise ValueError(f"{key}: {path} is damaged or no checkpoint ({reason})") from error
    keys = checkpoint.keys() if isinstance(checkpoint, dict) else ()
    missing = [name for name in ("state_dict", "spec", "recipe") if name not in keys]
    if missing:
        raise ValueError(f"{key}: {path} was not written by this project's train.py: it lacks {', '.join(missing)}")
    odd = [name for name in ("state_dict", "spec", "recipe") if not isinstance(checkpoint[name], Mapping)]
    if odd:
        raise ValueError(f"{key}: {path} was not written by this project's train.py: {odd[0]} is no mapping there")
    return checkpoint


def checkpoint_spec(checkpoint: Mapping[str, Any]) -> DataSpec:
    """The `DataSpec` that a checkpoint was trained on."""
    return DataSpec.from_dict(checkpoint["spec"])


def chosen_weights(checkpoint: dict[str, Any], weights: str) -> dict[str, Any]:
    """The checkpoint with the weights to be evaluated as its `state_dict`.

    Args:
        checkpoint: as read; with averaged weights (`callbacks.average`) it holds two sets.
        weights: `average`, `raw`, or `auto`: the average where there is one.

    Raises:
        ValueError: another word, or no average in a checkpoint that is asked for it.
    """
    if weights not in ("auto", "average", "raw"):
        raise ValueError(f"weights: expected auto, average or raw, got {weights!r}")
    both = "current_model_state" in checkpoint
    if weights == "average" and not both:
        raise ValueError("weights=average: the checkpoint was trained without callbacks.average, it has one set only")
    return {**checkpoint, "state_dict": checkpoint["current_model_state"]} if weights == "raw" and both else checkpoint


def weights_digest(checkpoint: Mapping[str, Any]) -> str:
    """Tells a checkpoint's weights from any others: SHA-256 of the names and values of its `state_dict`."""
    digest = hashlib.sha256()
    for name, value in sorted(checkpoint["state_dict"].items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Copy a checkpoint's weights into a module.

    Raises:
        ValueError: the checkpoint is of another model; says what differs.
    """
    own, given = module.state_dict(), checkpoint["state_dict"]
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = [k for k in own.keys() & given.keys() if own[k].shape != given[k].shape]
    if missing or unexpected or shapes:
        parts = []
        if shapes:
            k = min(shapes)
            there, here = tuple(given[k].shape), tuple(own[k].shape)
            parts.append(f"{len(shapes)} shapes differ ({k}: {there} there, {here} here)")
        parts += [f"{len(missing)} missing there ({missing[0]}, …)"] if missing else []
        parts += [f"{len(unexpected)} unknown here ({unexpected[0]}, …)"] if unexpected else []
        raise ValueError(f"the checkpoint is of another model than the configuration describes: {'; '.join(parts)}")
    module.load_state_dict(given)


def check_targets(config: Any, extra: Sequence[str] = (), where: str = "", trusted: tuple[str, ...] = TRUSTED) -> None:
    """Refuse a configuration whose `_target_`s lead out of the trusted modules.

    A prefix alone proves nothing (`bimamba.checkpoint.pickle.loads` begins well): the object found must itself be
    defined in a trusted module.

    Args:
        config: plain containers.
        extra: further module names that the user trusts.
        where: key of `config` in the whole, for messages.
        trusted: beginnings of the names that are allowed.

    Raises:
        ValueError: a target that is not allowed, with its key.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            here = f"{where}.{key}" if where else str(key)
            if key == "_target_":
                _check_target(value, extra, here, trusted)
            else:
                check_targets(value, extra, here, trusted)
    elif isinstance(config, list | tuple):
        for i, value in enumerate(config):
            check_targets(value, extra, f"{where}[{i}]", trusted)
    elif isinstance(config, str) and has_resolver(config):
        # A resolver could read the environment of whoever loads the checkpoint.
        raise ValueError(f"{where}: the checkpoint's configuration holds a resolver, {config!r}, which is not trusted")


def check_paths(config: Any, where: str, said: Collection[str]) -> None:
    """Refuse a configuration that writes outside of its run's folder: paths from the root, from home, or through `..`.

    What a training of this project writes lies under `${paths.output_dir}`, which the loader decides.

    Args:
        config: plain containers; callbacks, say. where: its key in the whole.
        said: keys that the user has repeated on the command line, and so means.

    Raises:
        ValueError: such a path, with its key.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            check_paths(value, f"{where}.{key}", said)
    elif isinstance(config, list | tuple):
        for i, value in enumerate(config):
            check_paths(value, f"{where}[{i}]", said)
    elif isinstance(config, str) and where not in said and _OUTSIDE.search(config):
        raise ValueError(
            f"{where}: the checkpoint's configuration leads out of its run's folder, to {config!r}; if you mean that, "
            f"repeat it on the command line: {where}={config}"
        )


def _check_target(target: Any, extra: Sequence[str], where: str, trusted: tuple[str, ...]) -> None:
    def allowed(name: str) -> bool:
        return name.startswith(trusted) or any(name == m or name.startswith(f"{m}.") for m in extra)

    refusal = (
        f"{where}: the checkpoint's configuration wants to call {target!r}, which is outside the trusted modules. If "
        "you wrote it, add its module to extras.trusted_modules=[...]"
    )
    if not isinstance(target, str) or not allowed(_ALIASES.get(target, target)):
        raise ValueError(refusal)
    found = locate(target)
    home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    if not callable(found) or not allowed(home):
        raise ValueError(refusal)
    if not isinstance(found, type) and home.startswith("bimamba.") and not home.startswith(FUNCTIONS):
        raise ValueError(refusal)


def locate(dotted: str) -> Any:
    """The object at a dotted path, or None; imports modules of the path that are modules of a trusted package."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found
    return None


def has_resolver(text: str) -> bool:
    """Whether a string refers to more than other keys: `${a.b}` does not, `${oc.env:HOME}` and nested forms do."""
    return "${" in re.sub(r"\$\{[\w.\[\]]+\}", "", text)


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for a mistyped dotted key, or nothing."""
    near = difflib.get_close_matches(key, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
