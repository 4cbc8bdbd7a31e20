"""An end where the monitored metric no longer improves."""

from __future__ import annotations

from typing import Any

import lightning.pytorch.callbacks as lightning_callbacks


class EarlyStopping(lightning_callbacks.EarlyStopping):
    """Lightning's `EarlyStopping`, where a resumed training has the patience that it is given.

    Lightning's own (2.6) takes the checkpoint's, and a training that was stopped could not go on for longer. The
    validations without improvement so far, and the best value, are those of the checkpoint here too.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # It goes on: how its first part ended is not how it ends
        running = {"patience": self.patience, "stopped_epoch": 0, "stopping_reason": 0, "stopping_reason_message": None}
        super().load_state_dict(state_dict | running)
