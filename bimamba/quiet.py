"""Less noise on the screen: what others print at every run, and nobody can act on."""

from __future__ import annotations

import logging
import warnings

LINES = (
    "litlogger",  # an advertisement
    "Trainer already configured with model summary callbacks",  # as configured
    "`weights_only` was not set",  # of saving: checkpoints hold more than weights; they are read by weights_only=True
    "Loading `train_dataloader` to estimate number of stepping batches",
)


def quiet() -> None:
    """Leave out those lines of Lightning's, and a deprecation that is between Lightning and torch."""
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(_worth_reading)
    # A resumed training goes on in its folder; a new one is refused there (bimamba.runs.claimed).
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # data.num_workers=auto has looked at the cores already, and what is in memory needs no workers
    warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")


def _worth_reading(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(line in text for line in LINES)
