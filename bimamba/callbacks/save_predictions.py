"""Test and predict: the table of predictions, and the plots that follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from bimamba import plots
from bimamba.figures import save_figure
from bimamba.predictions import FILE, class_probabilities, predicted_class, prediction_table, write_predictions
from bimamba.spec import DataSpec, spec_of


class SavePredictions(Callback):
    """Writes `predictions.parquet` after testing and predicting, and, where labels are known, the plots: confusion
    matrix, reliability, and for binary problems ROC and precision-recall (regression: predicted against true).

    Several processes: the parts are gathered on rank zero, put into the data set's order, each sample once.

    Args:
        output_dir: folder of the table.
        plot_dir: folder of the pictures.
    """

    def __init__(self, output_dir: str, plot_dir: str) -> None:
        self.output_dir, self.plot_dir = Path(output_dir), Path(plot_dir)
        self._rows: dict[str, list[Any]] = {}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows = {}

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows = {}

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._collect(outputs)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._collect(outputs)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, spec_of(pl_module), "test", trainer.test_dataloaders)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, spec_of(pl_module), "predict", trainer.predict_dataloaders)

    def _collect(self, outputs: dict[str, Any]) -> None:
        if "probabilities" not in outputs:  # a task that makes no prediction a row, such as pretraining
            return
        self._rows.setdefault("id", []).extend(outputs["id"])
        for key in ("probabilities", "label"):
            if key in outputs:
                self._rows.setdefault(key, []).append(outputs[key].detach().cpu())

    def _write(self, trainer: Trainer, spec: DataSpec, stage: str, loader: Any) -> None:
        part: dict[str, Any] = {k: v if k == "id" else torch.cat(v).numpy() for k, v in self._rows.items()}
        self._rows = {}
        part["row"] = _dataset_rows(loader, len(part.get("id", ())))
        parts = _gather(part, trainer.world_size)
        if not trainer.is_global_zero or not any(p.get("id") for p in parts):
            return
        parts = [p for p in parts if p.get("id")]
        ids = [i for p in parts for i in p["id"]]
        probabilities = np.concatenate([p["probabilities"] for p in parts])
        labels = np.concatenate([p["label"] for p in parts]) if all("label" in p for p in parts) else None
        if all(p["row"] is not None for p in parts):
            _, order = np.unique(np.concatenate([p["row"] for p in parts]), return_index=True)
        else:  # a sampler that we know nothing of: processes may have repeated samples
            order = np.sort(np.unique(ids, return_index=True)[1]) if len(parts) > 1 else np.arange(len(ids))
        ids, probabilities = [ids[i] for i in order], probabilities[order]
        labels = None if labels is None else labels[order]
        write_predictions(self.output_dir / FILE, prediction_table(spec, ids, probabilities, labels))
        if labels is not None and not trainer.fast_dev_run:
            self._plot(trainer, spec, stage, probabilities, labels)

    def _plot(
        self, trainer: Trainer, spec: DataSpec, stage: str, probabilities: np.ndarray, labels: np.ndarray
    ) -> None:
        def save(figure: Any, name: str) -> None:
            save_figure(trainer, figure, self.plot_dir, f"{name}_{stage}", f"{stage}/{name}")

        if spec.problem == "regression":
            save(plots.regression_scatter(probabilities, labels, spec.class_names), "regression")
            return
        truth = labels.astype(np.int64)
        save(plots.confusion_matrix(_counts(spec, probabilities, truth), spec.class_names, stage), "confusion_matrix")
        if spec.problem == "multiclass":
            confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == truth
            save(plots.reliability(confidence, correct, "probability of the predicted class"), "reliability")
        else:
            which = f"probability of {spec.class_names[1]}" if spec.problem == "binary" else "probability of a label"
            save(plots.reliability(probabilities.ravel(), truth.ravel(), which), "reliability")
        if spec.problem == "binary" and 0 < truth.sum() < len(truth):
            save(plots.roc_and_precision_recall(probabilities, truth, spec.class_names[1]), "roc_pr")


def _counts(spec: DataSpec, probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The confusion matrix: `(k, k)`, or `(k, 2, 2)` for multilabel."""
    if spec.problem == "multilabel":
        cells = truth * 2 + (probabilities > 0.5)
        return np.stack([np.bincount(column, minlength=4).reshape(2, 2) for column in cells.T])
    k = class_probabilities(spec, probabilities[:1]).shape[1]
    return np.bincount(truth * k + predicted_class(spec, probabilities), minlength=k * k).reshape(k, k)


def _dataset_rows(loader: Any, count: int) -> np.ndarray | None:
    """Positions in the data set of the first `count` samples of this process, if the sampler knows its batches."""
    batches = getattr(getattr(loader, "sampler", None), "batches", None)
    if batches is None:
        return None
    rows = np.concatenate([np.asarray(b, dtype=np.int64) for b in batches]) if len(batches) else np.empty(0, np.int64)
    return rows[:count]


def _gather(part: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    if world_size == 1:
        return [part]
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, part)
    return parts
