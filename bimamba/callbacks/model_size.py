"""How large the network is."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


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
