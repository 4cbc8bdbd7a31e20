"""Tasks: what is learned from a batch. One LightningModule serves every problem of a `DataSpec`."""

from .distillation import Distillation
from .losses import SampleLoss, probabilities
from .masked import MaskedTokenTask
from .metrics import make_confusion_matrix, make_metrics
from .supervised import SupervisedTask

__all__ = [
    "Distillation",
    "MaskedTokenTask",
    "SampleLoss",
    "SupervisedTask",
    "make_confusion_matrix",
    "make_metrics",
    "probabilities",
]
