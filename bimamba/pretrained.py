"""Trained models as folders: `config.json` (spec and model, plain values) and `model.safetensors`. Nothing in such a
folder can run code. `bimamba.hub` makes them, `bimamba.finetune` starts trainings from them."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import bimamba
from bimamba.checkpoint import check_targets, checkpoint_spec, locate, read_checkpoint
from bimamba.files import write_whole
from bimamba.spec import DataSpec

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Where the parts of a model may come from.
PARTS = ("bimamba.nn.", "bimamba.models.")
# How a training began is not what the model is.
NOT_SAVED = ("pretrained", "freeze")
# What a part's configuration may hold besides its arguments.
MARKS = ("_target_", "_partial_", "_convert_", "_recursive_")


@dataclass
class Pretrained:
    """A trained model, read but not yet built.

    Args:
        spec: of the data that it was trained on.
        model: arguments of `Classifier`, as of `describe`.
        state: its weights.
        origin: where it was read, for messages.
        training: what a checkpoint says of it: `splits` and `config`; a folder says nothing.
    """

    spec: DataSpec
    model: dict[str, Any]
    state: dict[str, Tensor]
    origin: str
    training: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------- a model's arguments as plain values


def describe(value: Any, name: str = "model") -> Any:
    """A model's argument as what JSON can hold.

    Classes and partials of classes become `{"_target_": …, "_partial_": true, …}` with all their options, those left at
    their defaults included, which a later version may change; infinities become the text `"inf"`.

    Raises:
        ValueError: a value that JSON cannot hold, such as a lambda.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): describe(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, Sequence):
        return [describe(v, name) for v in value]
    made, options = (value.func, value.keywords) if isinstance(value, partial) else (value, {})
    if isinstance(made, type) and not (isinstance(value, partial) and value.args):
        defaults = {k: p.default for k, p in inspect.signature(made).parameters.items() if p.default is not p.empty}
        described = {k: describe(v, f"{name}.{k}") for k, v in {**defaults, **options}.items()}
        return {"_target_": _public_name(made), "_partial_": True, **described}
    raise ValueError(
        f"{name}: expected plain values, a class, or functools.partial of a class with keywords, which {CONFIG} can "
        f"hold, got {value!r}"
    )


def _public_name(made: type) -> str:
    """`bimamba.nn.BiMamba2` rather than `bimamba.nn.mamba2.BiMamba2`, where both are the same."""
    module, _, _ = made.__module__.rpartition(".")
    short = f"{module}.{made.__qualname__}"
    return short if module and locate(short) is made else f"{made.__module__}.{made.__qualname__}"


def parts(described: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `describe`, for a configuration that `check_targets` has passed.

    Raises:
        ValueError: a `_target_` that is no module class.
    """
    return {key: _part(value, key) for key, value in described.items()}


def _part(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        made = locate(value["_target_"]) if "_target_" in value else None
        if not (isinstance(made, type) and issubclass(made, nn.Module)):
            raise ValueError(f"model.{name}: expected a `_target_` that is a module class, got {value.get('_target_')}")
        return partial(made, **{k: _part(v, f"{name}.{k}") for k, v in value.items() if k not in MARKS})
    if isinstance(value, list):
        return [_part(v, name) for v in value]
    return float(value) if value in ("inf", "-inf", "nan") else value


# ------------------------------------------------------------------------------------------------- writing and reading


def write_config(folder: Path, spec: DataSpec, model: Mapping[str, Any]) -> None:
    """Write `config.json`."""
    values = {
        "library_name": "bimamba",
        "bimamba_version": bimamba.__version__,
        "spec": spec.to_dict(),
        "model": dict(model),
    }
    write_whole(folder / CONFIG, json.dumps(values, indent=2, allow_nan=False) + "\n")


def find_folder(name: str | Path, key: str = "from_pretrained", **options: Any) -> Path:
    """A local folder, or the snapshot of a repository of the Hub (downloaded, or from the cache).

    Args:
        name: a path, or `user/model`.
        key: the option that named it, for messages.
        options: of `huggingface_hub.snapshot_download` (revision, token, cache_dir, force_download,
            local_files_only).

    Raises:
        FileNotFoundError: neither exists, or the Hub cannot be reached.
        ValueError: a file, or a name that can be neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{key}: expected a folder with {CONFIG} and {WEIGHTS}, got the file {path}")
    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS], **options))
    except HFValidationError:
        raise FileNotFoundError(f"{key}: no folder or file at {path.absolute()}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{key}: no folder or file at {path.absolute()}, and {name!s} cannot be had from the Hub ({reason})"
        ) from error


def read_folder(folder: Path, trusted_modules: Sequence[str] = ()) -> Pretrained:
    """A folder that `save_pretrained` wrote. Runs no code of it.

    Args:
        folder: with `config.json` and `model.safetensors`; other files are not looked at.
        trusted_modules: further modules that the model's parts may come from.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a damaged file, or a configuration of another library or with parts that are not trusted.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: expected {CONFIG} and {WEIGHTS} of save_pretrained; {name} is missing")
    try:
        values = json.loads((folder / CONFIG).read_text())
        spec, model = DataSpec.from_dict(dict(values["spec"])), dict(values["model"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{folder / CONFIG}: expected what save_pretrained writes, with 'spec' and 'model' ({error!r})"
        ) from error
    if any(name in model for name in NOT_SAVED):  # would read files of its choice
        raise ValueError(f"{folder / CONFIG}: {' and '.join(NOT_SAVED)} are no part of a saved model, but stand there")
    check_targets(model, trusted_modules, "model", PARTS)
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or no safetensors file ({error})") from error
    return Pretrained(spec, model, state, str(folder))


def read_pretrained(
    source: str | Path, key: str = "model.pretrained", trusted_modules: Sequence[str] = ()
) -> Pretrained:
    """A folder, a checkpoint of train.py (of one with averaged weights, those), or a repository of the Hub.

    Args:
        source: a path, or `user/model`.
        key: the option that named it, for messages.
        trusted_modules: of folders and repositories, see `read_folder`; a checkpoint's model is as it stands there, and
            whoever builds it must have `check_targets` pass it.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: damaged, or of another program.
    """
    path = Path(source).expanduser()
    if not (path.is_file() or path.suffix == ".ckpt"):
        folder = find_folder(source, key)
        try:
            return read_folder(folder, trusted_modules)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{key}: {error}") from error
    checkpoint = read_checkpoint(path, key)
    state = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    training: dict[str, Any] = {k: checkpoint[k] for k in ("splits", "config") if k in checkpoint}
    model = training.get("config", {}).get("model", {})
    return Pretrained(checkpoint_spec(checkpoint), model, state, str(path), training)
