"""Per-sample losses for the four problems of a `DataSpec`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba.spec import DataSpec

Weights = Sequence[float] | Mapping[str, float]  # one a class


def check_smoothing(label_smoothing: float) -> None:
    """Raises a ValueError for a share of the target that is none."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a value in [0, 1), got {label_smoothing}")


class SampleLoss(nn.Module):
    """Cross entropy, binary cross entropy with logits, or mean squared error: one value per sample.

    Losses stay per sample so that an epoch's loss is the exact mean over its samples whatever the batches were. A
    weighted loss is `weight[label] · loss`, not divided by the batch's sum of weights (as `F.cross_entropy` does), for
    the same reason; balanced weights have mean 1 over the training split, so the scale stays.

    Args:
        spec: decides the loss by its problem.
        label_smoothing: in [0, 1), moves this share of the target to the uniform distribution; classification only.
        class_weights: a weight per class (multiclass, binary), in order or by the classes' names, or `"balanced"`:
            N / (K · n_c) from `balance`.
        pos_weight: a weight of the positive target (binary: one number; multilabel: one per label, likewise), or
            `"balanced"`: negatives / positives from `balance`.

    Raises:
        ValueError: an option that the problem does not have, or of the wrong length or sign.
    """

    weight: Tensor

    def __init__(
        self,
        spec: DataSpec,
        label_smoothing: float = 0.0,
        class_weights: Weights | str | None = None,
        pos_weight: Weights | float | str | None = None,
    ) -> None:
        super().__init__()
        self.problem = spec.problem
        self.label_smoothing = label_smoothing
        check_smoothing(label_smoothing)
        if spec.problem == "regression" and (label_smoothing or class_weights is not None or pos_weight is not None):
            raise ValueError("label_smoothing, class_weights and pos_weight have no meaning for regression")
        if spec.problem == "multilabel" and class_weights is not None:
            raise ValueError("class_weights have no meaning for a multilabel problem: use pos_weight")
        if spec.problem == "multiclass" and pos_weight is not None:
            raise ValueError("pos_weight has no meaning for a multiclass problem: use class_weights")
        if class_weights is not None and pos_weight is not None:
            raise ValueError("class_weights and pos_weight exclude each other: give one of the two")
        option, name = (pos_weight, "pos_weight") if class_weights is None else (class_weights, "class_weights")
        self.balanced = option == "balanced"
        if isinstance(option, str) and not self.balanced:
            raise ValueError(f"{name}: expected numbers, 'balanced' or null, got {option!r}")
        # For multilabel the factor of positive targets, else the factor of each class; None as ones.
        size = len(spec.class_names)
        weight = torch.ones(size)
        if option is not None and not self.balanced:
            names = spec.class_names[1:] if name == "pos_weight" and spec.problem == "binary" else spec.class_names
            given = _numbers(name, option, names)
            weight = torch.tensor([1.0] * (size - len(given)) + given)
        self._by_pos_weight = name == "pos_weight"
        self.register_buffer("weight", weight)

    def balance(self, counts: Sequence[int], total: int) -> None:
        """Compute balanced weights from the training split.

        Args:
            counts: samples of each class (multilabel: samples that have the label).
            total: number of samples.

        Raises:
            ValueError: a class without a sample.
        """
        n = torch.as_tensor(counts, dtype=torch.float64)
        if len(n) != len(self.weight) or n.min() <= 0:
            raise ValueError(f"balanced weights need every class in the training split, got counts {list(counts)}")
        if self.problem == "multilabel":
            weight = (total - n) / n
        elif self._by_pos_weight:
            weight = torch.stack([torch.ones_like(n[0]), n[0] / n[1]])
        else:
            weight = total / (len(n) * n)
        self.weight.copy_(weight)

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:  # (b, outputs), (b) or (b, k) -> (b)
        """Loss of each sample, `(b)`.

        Args:
            logits: `(b, outputs)`.
            label: numbers of classes int64 `(b)` or, of mixed samples, their shares float (multiclass `(b, k)`, binary
                `(b)`, of the positive class); multilabel and regression float `(b, k)`. The loss of a mixed sample is
                that of its labels in their shares.
        """
        logits = logits.float()
        if self.problem == "regression":
            return (logits - label.float()).square().mean(-1)
        if self.problem == "multiclass" and not label.is_floating_point():
            loss = F.cross_entropy(logits, label, label_smoothing=self.label_smoothing, reduction="none")
            return loss * self.weight[label]
        if self.problem == "multiclass":
            each = -logits.log_softmax(-1)  # loss if this were the class
            each = (1 - self.label_smoothing) * each + self.label_smoothing * each.mean(-1, keepdim=True)
            return (label * self.weight * each).sum(-1)
        if self.problem == "binary":
            half, share = self.label_smoothing / 2, label.float()
            no, yes = (self._binary(logits[:, 0], target) for target in (half, 1 - half))
            return (1 - share) * self.weight[0] * no + share * self.weight[1] * yes
        target = label.float().view_as(logits)
        target = target * (1 - self.label_smoothing) + self.label_smoothing / 2
        loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=self.weight, reduction="none")
        return loss.mean(-1)

    @staticmethod
    def _binary(logit: Tensor, target: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, target), reduction="none")


def _numbers(key: str, option: Any, names: Sequence[str]) -> list[float]:
    """A positive number for each name, of numbers in their order, a mapping, or one number."""
    if isinstance(option, Mapping):
        given = {str(name): value for name, value in option.items()}
        if set(given) != set(names):
            raise ValueError(
                f"{key}: expected a number for each of {', '.join(names)}, got {', '.join(given) or 'none'}"
            )
        values = [given[name] for name in names]
    else:
        values = list(option) if isinstance(option, Sequence) else [option]
    if len(values) != len(names) or not all(isinstance(v, int | float) and v > 0 for v in values):
        raise ValueError(f"{key}: expected {len(names)} positive number(s), got {option}")
    return [float(v) for v in values]


def probabilities(spec: DataSpec, logits: Tensor) -> Tensor:
    """Logits `(b, outputs)` to float32 probabilities.

    Returns:
        multiclass `(b, k)`, sums to 1; binary `(b)`, of the positive class; multilabel `(b, k)`; regression `(b, k)`,
        the values themselves.
    """
    logits = logits.float()
    if spec.problem == "multiclass":
        return logits.softmax(-1)
    if spec.problem == "binary":
        return logits[:, 0].sigmoid()
    # Not the logits themselves: metrics keep them, and as a CUDA graph's output they would be written over
    return logits.sigmoid() if spec.problem == "multilabel" else logits.clone()
