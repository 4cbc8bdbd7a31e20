"""How large the network is."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichModelSummary


class ModelSize(Callback):
    """Logs `model/parameters` and `model/trainable_parameters` once, when training begins.

    Counted over the whole network, also where FSDP has sharded it: before the strategy sets it up.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._counts: dict[str, float] = {
            "model/parameters": sum(p.numel() for p in pl_module.parameters()),
            "model/trainable_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        for logger in trainer.loggers:
            logger.log_metrics(self._counts, step=trainer.global_step)


class NetworkSummary(RichModelSummary):
    """Lightning's table of modules, of the network alone: a task's losses and metrics would be most of its rows."""

    @staticmethod
    def summarize(summary_data: list[tuple[str, list[str]]], *args: Any, **kwargs: Any) -> None:
        names = dict(summary_data)["Name"]
        rows = [i for i, name in enumerate(names) if name.split(".")[0] == "net"] or list(range(len(names)))
        kept = [(column, [values[i] for i in rows]) for column, values in summary_data]
        RichModelSummary.summarize(kept, *args, **kwargs)
