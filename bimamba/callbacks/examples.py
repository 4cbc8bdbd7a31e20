"""Example predictions: pictures, or a table of sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from bimamba import plots
from bimamba.figures import denormalise, save_figure, save_table
from bimamba.predictions import decide
from bimamba.spec import DataSpec, spec_of

_WHY = {True: "first", False: "largest loss"}


class ExamplePredictions(Callback):
    """The first samples of the validation and test set, and those with the largest loss, with what was predicted.

    Images become `examples_<split>.png` (as they were before normalisation); sequences `examples_<split>.csv`. W&B gets
    the same as `samples/<split>`.

    Args:
        folder: of the pictures and tables.
        first: number of first samples.
        worst: number of samples with the largest loss.
        every_n_epochs: how often validation examples are taken, besides the last epoch.
    """

    def __init__(self, folder: str, first: int = 8, worst: int = 8, every_n_epochs: int = 10) -> None:
        self.folder = Path(folder)
        self.first, self.worst = first, worst
        self.every_n_epochs = every_n_epochs
        self._kept: list[dict[str, Any]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._kept = []

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._kept = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if trainer.is_global_zero and self._due(trainer):
            self._keep(outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if trainer.is_global_zero:
            self._keep(outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._due(trainer):
            self._show(trainer, spec_of(pl_module), "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._show(trainer, spec_of(pl_module), "test")

    def _due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking or trainer.fast_dev_run:
            return False
        done = trainer.current_epoch + 1
        return done % self.every_n_epochs == 0 or done == trainer.max_epochs

    def _keep(self, outputs: dict[str, Any], batch: dict[str, Any]) -> None:
        """Add a batch's candidates; whatever is neither among the first nor the worst goes again."""
        if "sample_loss" not in outputs:
            return
        loss = outputs["sample_loss"]
        begun = sum(row["first"] for row in self._kept)
        chosen = set(range(min(self.first - begun, len(loss))))
        new_first = len(chosen)
        if self.worst:
            chosen |= set(torch.topk(loss, min(self.worst, len(loss))).indices.tolist())
        for i in sorted(chosen):
            row = {"first": i < new_first, "loss": float(loss[i]), "id": outputs["id"][i]}
            row |= {k: outputs[k][i].detach().float().cpu() for k in ("probabilities", "label")}
            row["input"] = _input(batch, i)
            self._kept.append(row)
        worst = sorted((r for r in self._kept if not r["first"]), key=lambda r: -r["loss"])[: self.worst]
        self._kept = [r for r in self._kept if r["first"]] + worst

    def _show(self, trainer: Trainer, spec: DataSpec, split: str) -> None:
        rows = self._kept
        if not rows:
            return
        predicted = decide(spec, torch.stack([r["probabilities"] for r in rows]).numpy())
        truth = [_label_text(spec, r["label"].numpy()) for r in rows]
        if spec.kind == "image":
            images = np.stack([denormalise(spec, r["input"]) for r in rows])
            captions = [f"{p.text} {p.score}\n({t})" for p, t in zip(predicted, truth, strict=True)]
            wrong = [p.text != t for p, t in zip(predicted, truth, strict=True)]
            if spec.problem == "regression":
                wrong = [False] * len(rows)
            figure = plots.image_examples(images, captions, wrong)
            save_figure(trainer, figure, self.folder, f"examples_{split}", f"samples/{split}")
            return
        columns = ["id", "why", "label", "prediction", "score", "loss", "sequence"]
        table = [
            [
                r["id"],
                _WHY[r["first"]],
                t,
                p.text,
                p.score,
                round(r["loss"], 4),
                _text(spec, r),
            ]
            for r, p, t in zip(rows, predicted, truth, strict=True)
        ]
        save_table(trainer, columns, table, self.folder, f"examples_{split}", f"samples/{split}")


def _input(batch: dict[str, Any], i: int) -> torch.Tensor:
    """Sample i of a batch without padding, on the CPU."""
    if "seq_idx" in batch:
        row, number = divmod(int(batch["order"][i]), batch["bounds"].shape[1] - 1)
        first, end = batch["bounds"][row, number : number + 2].tolist()
        return batch["inputs"][row, first:end].cpu()
    return batch["inputs"][i][batch["mask"][i]].cpu() if "mask" in batch else batch["inputs"][i].cpu()


def _label_text(spec: DataSpec, label: np.ndarray) -> str:
    if spec.problem == "regression":
        return ", ".join(f"{v:.4g}" for v in np.atleast_1d(label))
    if spec.problem == "multilabel":
        return ", ".join(n for n, v in zip(spec.class_names, label, strict=True) if v > 0.5) or "none"
    return spec.class_names[int(label)]


def _text(spec: DataSpec, row: dict[str, Any]) -> str:
    """Token ids to characters, cut where a table can no longer be read."""
    ids = row["input"].tolist()
    text = "".join(spec.alphabet[i - 1] if i > 0 else "" for i in ids[:2000])  # type: ignore[index]
    return text if len(ids) <= 2000 else f"{text}… ({len(ids)})"
