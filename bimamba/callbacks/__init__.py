"""Callbacks of a run; configs/callbacks chooses among them and Lightning's own."""

from .average import AverageWeights
from .checkpoints import Checkpoints
from .early_stopping import EarlyStopping
from .exact_resume import ExactResume
from .examples import ExamplePredictions
from .finders import FindBatchSize, FindLearningRate
from .gradient_norm import GradientNorm
from .health import NumericalHealth
from .interrupt import SaveOnInterrupt, StopOnInterrupt
from .learning_curves import LearningCurves
from .model_size import ModelSize, NetworkSummary
from .progress import ProgressBar
from .save_predictions import SavePredictions
from .set_aside import SetAside
from .throughput import Throughput

__all__ = [
    "AverageWeights",
    "Checkpoints",
    "EarlyStopping",
    "ExactResume",
    "ExamplePredictions",
    "FindBatchSize",
    "FindLearningRate",
    "GradientNorm",
    "LearningCurves",
    "ModelSize",
    "NetworkSummary",
    "NumericalHealth",
    "ProgressBar",
    "SaveOnInterrupt",
    "SavePredictions",
    "SetAside",
    "StopOnInterrupt",
    "Throughput",
]
