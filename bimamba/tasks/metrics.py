"""Metrics over a whole epoch, by problem. Input: probabilities as of `losses.probabilities`, and labels."""

from __future__ import annotations

from typing import Any

import torch
import torchmetrics.classification as tmc
import torchmetrics.regression as tmr
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from bimamba.spec import DataSpec

# Names of what the tasks log, less their prefix (`val/`), by where the better values lie.
SMALL_IS_BETTER = {"loss", "loss_step", "mse", "mae", "calibration_error", "perplexity"}
LARGE_IS_BETTER = {
    *("accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1", "f1_macro", "mcc", "auroc"),
    *("average_precision", "exact_match", "r2", "pearson", "spearman"),
}


def mode_of(metric: str) -> str | None:
    """Whether a metric should become small (`min`) or large (`max`), by its name; None for one that no task makes."""
    name = metric.rpartition("/")[2]
    if name in SMALL_IS_BETTER:
        return "min"
    return "max" if name in LARGE_IS_BETTER else None


class LossMean(Metric):
    """Weighted mean of the training's losses over an epoch and all processes; NaN where no loss was a number.

    Losses that are NaN do not count: `callbacks.health` reports those and decides what becomes of the step.
    torchmetrics' `MeanMetric` leaves them out too, but asks the device at each update whether there is one, and so
    waits for it twice a step.
    """

    full_state_update = False
    mean_value: Tensor  # named as MeanMetric's states are: checkpoints in mid-epoch hold them
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean_value", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """Losses of any shape on the metric's device, and weights that broadcast to it."""
        missing = value.isnan()
        counted = torch.where(missing, 0.0, weight)
        self.mean_value = self.mean_value + (torch.where(missing, 0.0, value) * counted).sum()
        self.weight = self.weight + counted.sum()

    def compute(self) -> Tensor:
        return self.mean_value / self.weight


class _BalancedAccuracy(tmc.MulticlassAccuracy):
    """Mean recall of the classes that have cases, as scikit-learn has it; torchmetrics' own counts a class that is
    predicted and has none as 0."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(average="macro", **kwargs)

    def compute(self) -> Tensor:
        tp, _, _, fn = self._final_state()
        return (tp / (tp + fn)).nanmean()


class _BinaryBalancedAccuracy(_BalancedAccuracy):
    """(sensitivity + specificity) / 2, from the probability of the positive class."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(num_classes=2, **kwargs)

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update((preds > 0.5).long(), target)


class _BinaryMacroF1(tmc.MulticlassF1Score):
    """Mean of the F1 scores of the two classes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(num_classes=2, average="macro", **kwargs)

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update((preds > 0.5).long(), target)


class _MultilabelBalancedAccuracy(tmc.MultilabelStatScores):
    """Mean over labels of (sensitivity + specificity) / 2, or of one of them where the other has no case."""

    def __init__(self, num_labels: int, **kwargs: Any) -> None:
        super().__init__(num_labels=num_labels, average=None, **kwargs)

    def compute(self) -> Tensor:
        counts = super().compute()
        tp, fp, tn, fn, _ = counts.cpu().double().unbind(-1)  # Apple's GPUs have no float64
        return torch.stack([tp / (tp + fn), tn / (tn + fp)]).nanmean(0).nanmean().float().to(counts.device)


BOTH, POSITIVES = (0, 1), (1,)  # what a metric of a class needs: negatives and positives, or positives alone


class _OfClassesWithCases:
    """Mean over the classes whose rows allow a metric over thresholds, and NaN if there is none.

    torchmetrics counts the others as 0 (of average precision, some of them), so a class that a split lacks would lower
    the mean. Beside one of its metrics, which gives a value for each class `(k)`, of a binary problem `()`.
    """

    needs: tuple[int, ...] = BOTH
    thresholds: Any  # torchmetrics', like its states
    confmat: Any
    target: Any

    def compute(self) -> Any:  # a Tensor; the curves beneath return several
        if self.thresholds is not None:
            cases = self.confmat[0].sum(-1)
        else:
            target, classes = dim_zero_cat(self.target), getattr(self, "num_classes", None)
            positives = target.sum(0) if classes is None else torch.bincount(target, minlength=classes)
            cases = torch.stack([len(target) - positives, positives], -1)
        defined = (cases[..., self.needs] > 0).all(-1)
        return torch.where(defined, super().compute(), torch.nan).nanmean()  # type: ignore[misc]


class _BinaryAUROC(_OfClassesWithCases, tmc.BinaryAUROC):
    pass


class _MulticlassAUROC(_OfClassesWithCases, tmc.MulticlassAUROC):
    pass


class _MultilabelAUROC(_OfClassesWithCases, tmc.MultilabelAUROC):
    pass


class _BinaryAveragePrecision(_OfClassesWithCases, tmc.BinaryAveragePrecision):
    needs = POSITIVES


class _MulticlassAveragePrecision(_OfClassesWithCases, tmc.MulticlassAveragePrecision):
    needs = POSITIVES


class _MultilabelAveragePrecision(_OfClassesWithCases, tmc.MultilabelAveragePrecision):
    needs = POSITIVES


class _MultilabelCalibrationError(tmc.BinaryCalibrationError):
    """Calibration error over all (sample, label) pairs."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.flatten(), target.flatten())


def matthews(counts: Tensor) -> Tensor:
    """Matthews correlation, also for several classes (Gorodkin 2004), of a confusion matrix `(k, k)`.

    0 where truth or prediction knows one class alone, as scikit-learn has it. torchmetrics (1.9) gives 1 there if all
    is right, and some small number if not.
    """
    device, counts = counts.device, counts.cpu().double()  # Apple's GPUs have no float64
    true, predicted, total = counts.sum(1), counts.sum(0), counts.sum()
    covariance = counts.trace() * total - true @ predicted
    scale = ((total**2 - true @ true) * (total**2 - predicted @ predicted)).sqrt()
    return torch.where(scale > 0, covariance / scale, 0.0).float().to(device)


class _BinaryMCC(tmc.BinaryMatthewsCorrCoef):
    def compute(self) -> Tensor:
        return matthews(self.confmat)


class _MulticlassMCC(tmc.MulticlassMatthewsCorrCoef):
    def compute(self) -> Tensor:
        return matthews(self.confmat)


class _MultilabelMCC(tmc.MultilabelMatthewsCorrCoef):
    def compute(self) -> Tensor:
        return matthews(self.confmat.sum(0))


class _OfVaryingTargets:
    """Mean over the targets that vary, and NaN if none does, as where an epoch has one sample only
    (`trainer.fast_dev_run` with batches of one).

    torchmetrics gives 0 or NaN or, by rounding, any number there, and an exception for R2 of one sample. Beside one of
    its metrics, which gives a value for each target.
    """

    lowest: Tensor
    highest: Tensor
    add_state: Any  # torchmetrics'

    def __init__(self, outputs: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shape = (outputs,) if outputs > 1 else ()
        self.add_state("lowest", torch.full(shape, torch.inf), dist_reduce_fx="min")
        self.add_state("highest", torch.full(shape, -torch.inf), dist_reduce_fx="max")

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds, target)  # type: ignore[misc]
        self.lowest = torch.minimum(self.lowest, target.amin(0))
        self.highest = torch.maximum(self.highest, target.amax(0))

    def compute(self) -> Tensor:
        vary = (self.highest > self.lowest).reshape(-1)
        if not vary.any():
            return self.lowest.new_full((), torch.nan)
        return super().compute().reshape(-1)[vary].mean()  # type: ignore[misc]


class _R2(_OfVaryingTargets, tmr.R2Score):
    pass


class _Pearson(_OfVaryingTargets, tmr.PearsonCorrCoef):
    pass


class _Spearman(_OfVaryingTargets, tmr.SpearmanCorrCoef):
    pass


def _regression(outputs: int) -> dict[str, Metric]:
    return {
        "mse": tmr.MeanSquaredError(),
        "mae": tmr.MeanAbsoluteError(),
        "r2": _R2(outputs, multioutput="raw_values"),
        "pearson": _Pearson(outputs, num_outputs=outputs),
        "spearman": _Spearman(outputs, num_outputs=outputs),
    }


def _binary(n_bins: int, thresholds: int | None) -> dict[str, Metric]:
    o: dict[str, Any] = {"validate_args": False}
    return {
        "accuracy": tmc.BinaryAccuracy(**o),
        "balanced_accuracy": _BinaryBalancedAccuracy(**o),
        "sensitivity": tmc.BinaryRecall(**o),
        "specificity": tmc.BinarySpecificity(**o),
        "f1": tmc.BinaryF1Score(**o),
        "f1_macro": _BinaryMacroF1(**o),
        "mcc": _BinaryMCC(**o),
        "auroc": _BinaryAUROC(thresholds=thresholds, **o),
        "average_precision": _BinaryAveragePrecision(thresholds=thresholds, **o),
        "calibration_error": tmc.BinaryCalibrationError(n_bins=n_bins, **o),
    }


def _multiclass(k: int, n_bins: int, thresholds: int | None) -> dict[str, Metric]:
    o: dict[str, Any] = {"num_classes": k, "validate_args": False}
    return {
        "accuracy": tmc.MulticlassAccuracy(average="micro", **o),
        "balanced_accuracy": _BalancedAccuracy(**o),
        "f1": tmc.MulticlassF1Score(average="macro", **o),
        "mcc": _MulticlassMCC(**o),
        "auroc": _MulticlassAUROC(average=None, thresholds=thresholds, **o),
        "average_precision": _MulticlassAveragePrecision(average=None, thresholds=thresholds, **o),
        "calibration_error": tmc.MulticlassCalibrationError(n_bins=n_bins, **o),
    }


def _multilabel(k: int, n_bins: int, thresholds: int | None) -> dict[str, Metric]:
    o: dict[str, Any] = {"num_labels": k, "validate_args": False}
    return {
        "accuracy": tmc.MultilabelAccuracy(average="micro", **o),
        "exact_match": tmc.MultilabelExactMatch(**o),
        "balanced_accuracy": _MultilabelBalancedAccuracy(**o),
        "f1": tmc.MultilabelF1Score(average="macro", **o),
        "mcc": _MultilabelMCC(**o),
        "auroc": _MultilabelAUROC(average=None, thresholds=thresholds, **o),
        "average_precision": _MultilabelAveragePrecision(average=None, thresholds=thresholds, **o),
        "calibration_error": _MultilabelCalibrationError(n_bins=n_bins, validate_args=False),
    }


def metric_inputs(problem: str, probability: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """What `make_metrics` takes, from probabilities as of `losses.probabilities` and a batch's labels, mixed or not."""
    if problem == "regression":
        label = label.float()
        return (probability[:, 0], label[:, 0]) if probability.shape[1] == 1 else (probability, label)
    if label.is_floating_point() and problem == "multiclass":
        return probability, label.argmax(-1)  # of a mixed sample: the class that has the larger share
    return probability, (label + 0.5).long() if label.is_floating_point() else label


def make_metrics(spec: DataSpec, prefix: str, n_bins: int = 15, thresholds: int | None = None) -> MetricCollection:
    """Every scalar metric of a problem, to be accumulated over an epoch and over processes.

    - binary: accuracy, balanced_accuracy, sensitivity, specificity, f1 (of the positive class), f1_macro, mcc, auroc,
      average_precision, calibration_error;
    - multiclass: accuracy (share of samples), balanced_accuracy (mean recall of the classes), f1 (macro), mcc, auroc
      (one against the rest, macro), average_precision (macro), calibration_error (of the top class, L1);
    - multilabel: accuracy (over all pairs of sample and label), exact_match, balanced_accuracy, f1, auroc and
      average_precision (macro over labels), mcc and calibration_error (over all pairs);
    - regression: mse, mae, and the means over targets of r2, pearson and spearman.

    Means over classes, labels or targets are of those whose rows allow the metric: balanced_accuracy needs cases of a
    class, average_precision positives, auroc positives and negatives, r2 and the correlations a target that varies.
    NaN where there is none.

    Args:
        spec: the problem and its classes.
        prefix: of the names, for instance `"val/"`.
        n_bins: of the calibration error.
        thresholds: null keeps every probability of the epoch and is exact; a number bins auroc and average_precision,
            which bounds memory for many classes and samples.
    """
    k = len(spec.class_names)
    metrics = {
        "regression": lambda: _regression(k),
        "binary": lambda: _binary(n_bins, thresholds),
        "multiclass": lambda: _multiclass(k, n_bins, thresholds),
        "multilabel": lambda: _multilabel(k, n_bins, thresholds),
    }[spec.problem]()
    return MetricCollection(dict[str, Metric | MetricCollection](metrics), prefix=prefix)


def make_train_metric(spec: DataSpec) -> Metric | None:
    """Accuracy, the one metric besides the loss that is followed over training batches; None for regression."""
    if spec.problem == "regression":
        return None
    if spec.problem == "binary":
        return tmc.BinaryAccuracy(validate_args=False)
    k = len(spec.class_names)
    if spec.problem == "multilabel":
        return tmc.MultilabelAccuracy(num_labels=k, average="micro", validate_args=False)
    return tmc.MulticlassAccuracy(num_classes=k, average="micro", validate_args=False)


def make_confusion_matrix(spec: DataSpec) -> Metric | None:
    """Counts `(k, k)`, rows true and columns predicted (multilabel: `(k, 2, 2)`); None for regression."""
    k = len(spec.class_names)
    if spec.problem == "binary":
        return tmc.BinaryConfusionMatrix(validate_args=False)
    if spec.problem == "multiclass":
        return tmc.MulticlassConfusionMatrix(num_classes=k, validate_args=False)
    return tmc.MultilabelConfusionMatrix(num_labels=k, validate_args=False) if spec.problem == "multilabel" else None
