"""Ctrl-C leaves a checkpoint."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class SaveOnInterrupt(Callback):
    """Saves `interrupted.ckpt` when a training is stopped by Ctrl-C, and says where it is and how to go on.

    Args:
        dirpath: folder of the checkpoint.
    """

    def __init__(self, dirpath: str) -> None:
        self.path = Path(dirpath) / "interrupted.ckpt"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt) or trainer.state.fn != "fit" or trainer.fast_dev_run:
            return
        if trainer.global_step == 0:
            _say("Interrupted before the first step: there is nothing to save.")
            return
        trainer.save_checkpoint(self.path)
        _say(
            f"Interrupted at step {trainer.global_step} (epoch {trainer.current_epoch}). Saved {self.path}\n"
            f"Go on with:  python train.py ckpt_path={_quoted(self.path)}"
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed training that reached its end has no use for the interruption of its first part.
        if trainer.is_global_zero and self.path.exists():
            self.path.unlink()


@rank_zero_only
def _say(message: str) -> None:
    print(f"\n{message}", flush=True)


def _quoted(path: Path) -> str:
    """The path as Hydra's grammar and a shell read it."""
    text = str(path)
    return text if all(c.isalnum() or c in "/._-:%@" for c in text) else f"'\"{text}\"'"
