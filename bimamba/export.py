"""stage=export: from a checkpoint to a folder that others can load, with a card that says what is known of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from hydra.utils import instantiate
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from bimamba.checkpoint import DRAWN_BY, IDENTITY, checkpoint_spec, load_weights, weights_digest
from bimamba.collect import in_use
from bimamba.config import run_folder
from bimamba.files import write_json
from bimamba.program import example, export_program, pytorch_path

log = logging.getLogger(__name__)

PROGRAM = "model.pt2"
EVALUATED = "evaluated.json"  # in a test's folder: its figures, with the weights and the configuration that gave them
VIEWS = ("test_time_rc", "test_time_flip")  # what decides how often each row is looked at


@rank_zero_only
def export(cfg: DictConfig, checkpoint: Mapping[str, Any]) -> Path:
    """Write `config.json`, `model.safetensors`, `README.md` and `model.pt2` of a checkpoint.

    Args:
        cfg: of the run, the checkpoint's model in it; `cfg.export` says where to and what.
        checkpoint: as read by `read_checkpoint`.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds something already, the weights do not fit the model, or the Hub refuses.
    """
    folder = Path(cfg.export.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"export.folder: expected a new or empty folder, got {folder}, which holds something already")
    spec = checkpoint_spec(checkpoint)
    model = instantiate(cfg.model)(spec=spec, pretrained=None, freeze=None)
    state = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    load_weights(model, {"state_dict": state})
    model.eval()

    facts = gather(Path(cfg.ckpt_path), checkpoint, cfg.weights)
    facts |= {"name": cfg.export.repo or folder.name, "license": cfg.export.license}
    if cfg.export.program:
        what = (
            "the same as a program of `torch.export`, which needs this package no more: `torch.export.load(…).module()`"
        )
        facts["files"] = {PROGRAM: what}
    model.save_pretrained(folder, model_card_kwargs=facts)
    again, inputs = type(model).from_pretrained(folder, trusted_modules=cfg.extras.trusted_modules), example(spec, 2)
    with torch.no_grad(), pytorch_path():
        assert torch.equal(again(*inputs), model(*inputs)), "the saved model computes something else"
    if cfg.export.program:
        export_program(model, folder / PROGRAM)
    log.info("Model in %s. Load it: bimamba.models.Classifier.from_pretrained(%r)", folder, str(folder))
    if cfg.export.repo:
        log.info("Uploaded: %s", upload(folder, cfg.export.repo, cfg.export.private))
    return folder


def upload(folder: Path, repo: str, private: bool) -> str:
    """Put a folder on the Hub.

    Returns:
        The commit's address.

    Raises:
        ValueError: the Hub refuses, or cannot be reached.
    """
    try:
        api = HfApi()
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with BiMamba"))
    except (HFValidationError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"export.repo: {repo} could not be uploaded ({reason}); the model is in {folder}. Log in by `hf auth login`"
        ) from error


def gather(ckpt_path: Path, checkpoint: Mapping[str, Any], weights: str = "auto") -> dict[str, Any]:
    """What checkpoint and run folder know for the card: arguments of `model_card`.

    Args:
        ckpt_path: of the checkpoint. checkpoint: as read.
        weights: see `bimamba.checkpoint.chosen_weights`; figures of the averaged weights say nothing of the raw ones.
    """
    config = checkpoint.get("config", {})
    run = run_folder(ckpt_path)
    preflight = _read(run / "preflight.json") if run else {}
    averaged = "current_model_state" in checkpoint
    metrics, of = ({}, "") if averaged and weights == "raw" else find_metrics(ckpt_path, checkpoint)
    trainer = config.get("trainer", {})
    protocol = {
        "experiment": checkpoint.get("choices", {}).get("experiment"),
        "seed": config.get("seed"),
        "epochs": f"{checkpoint['epoch'] + 1} of {trainer.get('max_epochs')}" if "epoch" in checkpoint else None,
        "optimizer steps": checkpoint.get("global_step"),
        "chosen by": f"{config.get('monitor')} ({config.get('monitor_mode')})" if config.get("monitor") else None,
        "weights": ("raw" if weights == "raw" else "averaged over the training") if averaged else None,
        "started from": config.get("model", {}).get("pretrained"),
        "frozen": config.get("model", {}).get("freeze"),
        **{k: trainer.get(k) for k in ("precision", "accumulate_grad_batches", "gradient_clip_val")},
        "task": in_use(config)["task"],
    }
    return {
        "data": config.get("data"),
        "sizes": preflight.get("sizes"),
        "protocol": protocol,
        "metrics": metrics,
        "metrics_of": of,
    }


def find_metrics(ckpt_path: Path, checkpoint: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """Test figures of exactly these weights on the run's own test rows, and where they are from; empty if unknown."""
    run = run_folder(ckpt_path)
    if run is None:
        return {}, ""
    config = checkpoint.get("config", {})
    views = _views(config)
    said = f", by task.{views[0]} (the model itself gives the logits of one view)" if views else ""
    if ckpt_path.name == "best.ckpt":  # the one that train.py tests after fit
        found = _test_figures(run / "metrics.json")
        if found:
            return found, f"the test rows, once, with the checkpoint that validation chose{said}"
    weights = weights_digest(checkpoint)
    for folder in sorted((run / "test").glob("*/"), reverse=True):
        evaluated = _read(folder / EVALUATED)
        if evaluated.get("weights") != weights:
            continue
        of = evaluated["config"]
        # An evaluation on other rows, or on some of them, does not belong into a model's card
        same = all(of.get("data", {}).get(k) == config.get("data", {}).get(k) for k in (*IDENTITY, *DRAWN_BY))
        whole = of["trainer"].get("limit_test_batches") in (None, 1.0) and not of["trainer"].get("fast_dev_run")
        if same and whole and _views(of) == views:
            return evaluated["metrics"], f"the test rows, by stage=test ({folder.name}){said}"
    return {}, ""


@rank_zero_only
def record_evaluation(folder: Path, checkpoint: Mapping[str, Any], config: Mapping[str, Any], metrics: dict) -> None:
    """What `find_metrics` takes for the card, in one file: another training may write to the checkpoint's path, and
    another test into this folder."""
    values = {"weights": weights_digest(checkpoint), "config": config, "metrics": metrics}
    write_json(folder / EVALUATED, values)


def _views(config: Mapping[str, Any]) -> list[str]:
    """Switches of the task by which test figures are of the mean of two views of each row; the model gives one."""
    return [name for name in VIEWS if config.get("task", {}).get(name)]


def _test_figures(path: Path) -> dict[str, float]:
    return {k: v for k, v in _read(path).items() if k.startswith("test/")}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
