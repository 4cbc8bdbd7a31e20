"""The README.md of a saved model: what it is, on which data, by which protocol, how good, and how it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import EvalResult

import bimamba
from bimamba.spec import DataSpec
from bimamba.strands import is_dna

if TYPE_CHECKING:
    from bimamba.hub import HubModel

# Options that decide how fast a training runs, or nothing at all for who reads the card.
HOUSEKEEPING = {
    "_target_",
    "_partial_",
    "_convert_",
    "predict",
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "prefetch_factor",
    "eval_batch_size",
    "cache_dir",
    "check_duplicates",
    "compile",
    "calibration_bins",
    "thresholds",
}
# This project's metrics under the Hub's names, for the leaderboards' table in the card's head.
HUB_METRICS = {"accuracy": "accuracy", "f1": "f1", "mcc": "matthews_correlation", "auroc": "roc_auc", "mse": "mse"}

IMAGE_CODE = """\
from bimamba.models import Classifier

model = Classifier.from_pretrained("{name}")  # config.json and safetensors: no code is run
spec = model.spec
images = torch.rand(2, spec.channels, spec.height, spec.width)  # RGB or grey in [0, 1], of this size
{normalise}logits = model(images)  # (2, {outputs})"""
NORMALISE = """\
mean, std = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
images = (images - mean) / std
"""
SEQUENCE_CODE = """\
from bimamba.data.sequences import token_table
from bimamba.models import Classifier

model = Classifier.from_pretrained("{name}")  # config.json and safetensors: no code is run
token = torch.from_numpy(token_table(model.spec.alphabet))  # of a byte; case does not matter{thymine}; 0 is padding
rows = {rows}
tokens = [token[list(row.encode())].long() for row in rows]
inputs = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
logits = model(inputs, mask=inputs > 0)  # (2, {outputs})"""


def model_card(
    model: HubModel,
    *,
    name: str | None = None,
    data: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    protocol: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    metrics_of: str | None = None,
    license: str | None = None,
    files: Mapping[str, str] | None = None,
) -> ModelCard:
    """The card of a `Classifier`.

    Args:
        model: has `spec` and `arguments`.
        name: of folder or repository, for the code example and the title.
        data: the data's configuration. Of absolute paths only the last part is told.
        sizes: rows of each split.
        protocol: how it was trained.
        metrics: figures, such as `{"test/accuracy": 0.97}`.
        metrics_of: which rows and which weights they are of.
        license: an identifier of the Hub.
        files: further files of the folder, and what they are.

    Returns:
        The card; what nobody told is said to be unknown.
    """
    spec = model.spec
    title = (name or "bimamba classifier").rstrip("/").rpartition("/")[2]
    count = sum(p.numel() for p in model.parameters())
    text = [
        f"# {title}",
        f"A bidirectional Mamba-2 {_what(spec)}, {count:,} parameters, trained with BiMamba {bimamba.__version__}.",
        f"Classes: {', '.join(f'`{c}`' for c in spec.class_names[:50])}"
        + (f" and {len(spec.class_names) - 50} more." if len(spec.class_names) > 50 else "."),
        "## Data",
        _table({**_flat(data or {}), **{f"rows ({k})": v for k, v in (sizes or {}).items()}}, "Not recorded."),
        "## Protocol",
        _table(_flat(protocol or {}), "Not recorded."),
        "## Metrics",
        *([f"Of {metrics_of}."] if metrics and metrics_of else []),
        _table({k: f"{v:.4f}" for k, v in (metrics or {}).items()}, "None recorded: evaluate before you trust it."),
        "## Use",
        f"```python\nimport torch\n{_code(spec, name or 'FOLDER')}\n```",
        f"Outputs are {_outputs(spec)}. Fine-tune with `python train.py … model.pretrained=FOLDER`, and "
        "`model.freeze=backbone` for a new head on fixed features.",
        *[f"`{file}`: {what}" for file, what in (files or {}).items()],
        "## Model",
        _table(_flat(_arguments(model)), ""),
    ]
    head = ModelCardData(
        library_name="bimamba",
        license=license,
        pipeline_tag="image-classification" if spec.kind == "image" and spec.problem != "regression" else None,
        tags=["mamba-2", "state-space-model", "bidirectional", _tag(spec)],
        model_name=title,
        eval_results=_results(spec, data or {}, metrics or {}),
    )
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n")


def _code(spec: DataSpec, name: str) -> str:
    if spec.kind == "image":
        known = spec.mean is not None and spec.std is not None
        return IMAGE_CODE.format(name=name, outputs=spec.num_outputs, normalise=NORMALISE if known else "")
    letters = spec.letters
    dna = is_dna(letters)
    rows = ["ACGTTGCA", "TTGACAN"] if dna else [letters[:8], letters[-7:]]
    thymine = ", U is T" if dna else ""
    return SEQUENCE_CODE.format(name=name, outputs=spec.num_outputs, thymine=thymine, rows=json.dumps(rows))


def _tag(spec: DataSpec) -> str:
    if spec.kind == "image":
        return "image"
    return "dna" if is_dna(spec.letters) else "sequence"


def _what(spec: DataSpec) -> str:
    if spec.kind == "image":
        return f"{spec.problem} model of {spec.height}×{spec.width} images with {spec.channels} channels"
    return f"{spec.problem} model of sequences of up to {spec.max_length} letters ({spec.alphabet})"


def _outputs(spec: DataSpec) -> str:
    return {
        "multiclass": "logits: `softmax` gives the probabilities of the classes, in their order above",
        "binary": f"one logit: `sigmoid` gives the probability of `{spec.class_names[-1]}`",
        "multilabel": "logits: `sigmoid` gives the probability of each label",
        "regression": "the values themselves",
    }[spec.problem]


def _arguments(model: HubModel) -> dict[str, Any]:
    from bimamba.pretrained import describe

    return describe(model.arguments)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of what is set; a part's class under its own key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key == "_target_":
            found[prefix.rstrip(".") or "class"] = str(value).rpartition(".")[2]
        elif value is None or key in HOUSEKEEPING or value == {}:
            continue
        elif isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = [_told(v) for v in value] if isinstance(value, list) else _told(value)
    return found


def _told(value: Any) -> Any:
    """Of an absolute path the last part: a person's folders are nobody's business."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _table(rows: Mapping[str, Any], otherwise: str) -> str:
    if not rows:
        return otherwise
    lines = [f"| {_cell(k)} | {_cell(v)} |" for k, v in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _results(spec: DataSpec, data: Mapping[str, Any], metrics: Mapping[str, float]) -> list[EvalResult] | None:
    source = data.get("source") or {}
    name = source.get("hub") or data.get("task") or data.get("path") or source.get("_target_", "unknown")
    dataset = Path(str(name)).name if Path(str(name)).is_absolute() else str(name).removeprefix("bimamba.data.sources.")
    found = [
        EvalResult(
            task_type="image-classification" if spec.kind == "image" else "other",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="test",
            metric_type=HUB_METRICS[name.removeprefix("test/")],
            metric_value=round(value, 6),
        )
        for name, value in metrics.items()
        if name.removeprefix("test/") in HUB_METRICS and name.startswith("test/")
    ]
    return found or None
