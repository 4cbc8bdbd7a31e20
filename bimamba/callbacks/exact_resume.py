"""What a checkpoint needs besides Lightning's own so that a resumed training does what an uninterrupted one does."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchmetrics import Metric

KEY = "exact_resume"


class ExactResume(Callback):
    """Saves the states of torch's, NumPy's and Python's random generators, and the metrics of an unfinished epoch.

    With them dropout, augmentation and everything else that is drawn goes on as it would have, and `train/loss` of the
    epoch counts its first part too. The order of the data needs no saving: it follows from seed, epoch and the number
    of batches done (`bimamba.data.loader`). On a CPU a resumed training equals an uninterrupted one bit for bit; on a
    GPU as far as its kernels do. Each process has a state of its own; with another number of processes than at the
    time of saving the generators start anew, and the log says so.

    In a new training of several processes each gets generators of its own: with one seed for all, every process would
    draw the same augmentations and the same dropout for its part of a batch.
    """

    def __init__(self) -> None:
        self._saved: list[dict[str, Any]] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        mine: dict[str, Any] = {"random": random_states(pl_module.device), "metrics": {}}
        # Not only while `trainer.training`: a validation in mid-epoch saves as well.
        if trainer.state.fn == "fit" and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            mine["metrics"] = {name: _metric_state(m) for name, m in _metrics(pl_module) if m.update_called}
        states = [mine]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size  # type: ignore[list-item]
            torch.distributed.all_gather_object(states, mine)
        checkpoint[KEY] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get(KEY)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        states, self._saved = self._saved, None
        if states is not None and len(states) == trainer.world_size:
            mine = states[trainer.global_rank]
            set_random_states(mine["random"], pl_module.device)
            metrics = dict(_metrics(pl_module))
            for name, state in mine["metrics"].items():
                _set_metric_state(metrics[name], state)
            return
        if states is not None:
            rank_zero_warn(
                f"The checkpoint was saved by {len(states)} process(es), this training has {trainer.world_size}: it "
                "goes on with new random numbers, not with those of an uninterrupted training."
            )
        if trainer.global_rank:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)


def random_states(device: torch.device) -> dict[str, Any]:
    """States of the global generators as tensors and plain values, which load under `weights_only=True`."""
    state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = state
    states = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """The inverse of `random_states`; a state of a GPU is left out where there is none."""
    torch.set_rng_state(states["torch"].cpu())
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def _metrics(module: torch.nn.Module) -> list[tuple[str, Metric]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, Metric)]


def _metric_state(metric: Metric) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return [v.detach().cpu() for v in value] if isinstance(value, list) else value.detach().cpu()

    return {"count": metric._update_count, "values": {k: plain(v) for k, v in metric.metric_state.items()}}


def _set_metric_state(metric: Metric, state: dict[str, Any]) -> None:
    for name, value in state["values"].items():
        on_device = [v.to(metric.device) for v in value] if isinstance(value, list) else value.to(metric.device)
        setattr(metric, name, on_device)
    metric._update_count = state["count"]
