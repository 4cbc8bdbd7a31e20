"""Metrics of uneven batches equal scikit-learn's on the whole epoch."""

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MeanMetric

from bimamba.spec import DataSpec
from bimamba.tasks import make_confusion_matrix, make_metrics
from bimamba.tasks.metrics import LossMean

SPLITS = [13, 1, 50, 36]  # batches of one epoch of 100


def spec(problem, k):
    return DataSpec("sequence", problem, tuple("abcdefgh"[:k]), alphabet="ACGTN", max_length=9)


def epoch(problem, k, probability, label):
    metrics, confusion = make_metrics(spec(problem, k), "val/"), make_confusion_matrix(spec(problem, k))
    for p, y in zip(probability.split(SPLITS), label.split(SPLITS), strict=True):
        metrics.update(p, y)
        if confusion is not None:
            confusion.update(p, y)
    values = {key.removeprefix("val/"): float(v.float().mean()) for key, v in metrics.compute().items()}
    return values, None if confusion is None else confusion.compute().numpy()


def calibration(confidence, correct, bins=15):
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [(index == b).mean() * abs(confidence[index == b].mean() - correct[index == b].mean()) for b in set(index)]
    return sum(gaps)


def test_binary():
    torch.manual_seed(0)
    label = (torch.rand(100) < 0.3).long()
    p = (0.6 * torch.rand(100) + 0.4 * label).clamp(0.01, 0.99)
    got, matrix = epoch("binary", 2, p, label)
    y, q = label.numpy(), p.double().numpy()
    hard = (q > 0.5).astype(int)
    expected = {
        "accuracy": sk.accuracy_score(y, hard),
        "balanced_accuracy": sk.balanced_accuracy_score(y, hard),
        "sensitivity": sk.recall_score(y, hard),
        "specificity": sk.recall_score(y, hard, pos_label=0),
        "f1": sk.f1_score(y, hard),
        "f1_macro": sk.f1_score(y, hard, average="macro"),
        "mcc": sk.matthews_corrcoef(y, hard),
        "auroc": sk.roc_auc_score(y, q),
        "average_precision": sk.average_precision_score(y, q),
        "calibration_error": calibration(q, y),
    }
    assert got == pytest.approx(expected, abs=1e-5)
    assert (matrix == sk.confusion_matrix(y, hard)).all()


def test_multiclass():
    torch.manual_seed(1)
    label = torch.randint(4, (100,))
    p = (torch.randn(100, 4) + 1.5 * torch.nn.functional.one_hot(label, 4)).softmax(-1)
    got, matrix = epoch("multiclass", 4, p, label)
    y, q = label.numpy(), p.double().numpy()
    hard = q.argmax(1)
    expected = {
        "accuracy": sk.accuracy_score(y, hard),
        "balanced_accuracy": sk.balanced_accuracy_score(y, hard),
        "f1": sk.f1_score(y, hard, average="macro"),
        "mcc": sk.matthews_corrcoef(y, hard),
        "auroc": sk.roc_auc_score(np.eye(4)[y], q, average="macro"),
        "average_precision": sk.average_precision_score(np.eye(4)[y], q, average="macro"),
        "calibration_error": calibration(q.max(1), hard == y),
    }
    assert got == pytest.approx(expected, abs=1e-5)
    assert (matrix == sk.confusion_matrix(y, hard)).all()


def test_multilabel():
    torch.manual_seed(2)
    label = (torch.rand(100, 3) < torch.tensor([0.2, 0.5, 0.7])).long()
    p = (0.5 * torch.rand(100, 3) + 0.4 * label).clamp(0.01, 0.99)
    got, matrix = epoch("multilabel", 3, p, label)
    y, q = label.numpy(), p.double().numpy()
    hard = (q > 0.5).astype(int)
    expected = {
        "accuracy": (y == hard).mean(),
        "exact_match": sk.accuracy_score(y, hard),
        "balanced_accuracy": np.mean([sk.balanced_accuracy_score(y[:, i], hard[:, i]) for i in range(3)]),
        "f1": sk.f1_score(y, hard, average="macro"),
        "mcc": sk.matthews_corrcoef(y.ravel(), hard.ravel()),
        "auroc": sk.roc_auc_score(y, q, average="macro"),
        "average_precision": sk.average_precision_score(y, q, average="macro"),
        "calibration_error": calibration(q.ravel(), y.ravel()),
    }
    assert got == pytest.approx(expected, abs=1e-5)
    assert (matrix == sk.multilabel_confusion_matrix(y, hard)).all()


@pytest.mark.parametrize("k", [1, 2])
def test_regression(k):
    torch.manual_seed(3)
    label = torch.randn(100, k)
    value = label + 0.5 * torch.randn(100, k)
    flat = (lambda t: t[:, 0]) if k == 1 else (lambda t: t)
    got, matrix = epoch("regression", k, flat(value), flat(label))
    y, v = label.double().numpy(), value.double().numpy()
    expected = {
        "mse": sk.mean_squared_error(y, v),
        "mae": sk.mean_absolute_error(y, v),
        "r2": sk.r2_score(y, v),
        "pearson": np.mean([stats.pearsonr(y[:, i], v[:, i])[0] for i in range(k)]),
        "spearman": np.mean([stats.spearmanr(y[:, i], v[:, i])[0] for i in range(k)]),
    }
    assert got == pytest.approx(expected, abs=1e-4)
    assert matrix is None


@pytest.mark.parametrize("k", [1, 2])
def test_what_does_not_vary_has_no_correlation(k):
    """A target that is constant in a split is left out of the mean over targets; one sample is constant, too."""
    value, label = torch.randn(100, k), torch.randn(100, k)
    label[:, 0] = 0.3
    flat = (lambda t: t[:, 0]) if k == 1 else (lambda t: t)
    got, _ = epoch("regression", k, flat(value), flat(label))
    y, v = label.double().numpy(), value.double().numpy()
    expected = {
        "r2": sk.r2_score(y[:, 1], v[:, 1]) if k == 2 else np.nan,
        "pearson": stats.pearsonr(y[:, 1], v[:, 1])[0] if k == 2 else np.nan,
        "spearman": stats.spearmanr(y[:, 1], v[:, 1])[0] if k == 2 else np.nan,
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-4, nan_ok=True)
    one = make_metrics(spec("regression", 1), "")
    one.update(torch.ones(1), torch.ones(1))
    assert all(one[name].compute().isnan() for name in expected)


@pytest.mark.filterwarnings("ignore:No (positive|negative) samples")
@pytest.mark.parametrize("thresholds", [None, 10_001])
def test_a_class_that_a_split_lacks_is_left_out_of_means(thresholds):
    torch.manual_seed(4)
    names = ("balanced_accuracy", "auroc", "average_precision")

    def measured(problem, k, p, y):
        metrics = make_metrics(spec(problem, k), "", thresholds=thresholds)
        metrics.update(p, y)
        return {name: float(v) for name, v in metrics.compute().items() if name in names}

    def expected(y, q):  # of one class against the others
        both, some = len(set(y)) == 2, 1 in y
        return sk.roc_auc_score(y, q) if both else np.nan, sk.average_precision_score(y, q) if some else np.nan

    y, q = torch.randint(3, (100,)), torch.randn(100, 4).softmax(-1)  # class 3 is predicted, and has no case
    each = [expected((y == c).long().numpy(), q[:, c].numpy()) for c in range(3)]
    mean = [sk.recall_score(y, q.argmax(1), average="macro", labels=[0, 1, 2]), *np.mean(each, 0)]
    mean = dict(zip(names, mean, strict=True))
    assert measured("multiclass", 4, q, y) == pytest.approx(mean, abs=1e-3)

    y, q = (torch.rand(100, 4) < 0.4).long(), torch.rand(100, 4)
    y[:, 2], y[:, 3] = 0, 1
    each = [expected(y[:, c].numpy(), q[:, c].numpy()) for c in range(4)]
    hard = (q > 0.5).long()
    recalls = [np.mean([(hard[y[:, c] == v, c] == v).double().mean() for v in set(y[:, c].tolist())]) for c in range(4)]
    mean = dict(zip(names, [np.mean(recalls), *np.nanmean(each, 0)], strict=True))
    assert measured("multilabel", 4, q, y) == pytest.approx(mean, abs=1e-3)

    q = torch.rand(100)
    for y in (0, 1):
        recall = float(((q > 0.5) == y).float().mean())
        values = {"balanced_accuracy": recall, "auroc": np.nan, "average_precision": 1.0 if y else np.nan}
        found = measured("binary", 2, q, torch.full((100,), y))
        assert found == pytest.approx(values, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("truth", [0, 1, None])
@pytest.mark.parametrize("said", [0, 1, None])
def test_a_correlation_with_what_does_not_vary_is_zero(truth, said):
    """torchmetrics' own gives 1 where one class is all there is and all that is said."""
    some = torch.tensor([0, 1, 1, 0, 1])
    y, q = (some.flip(0) if v is None else torch.full((5,), v) for v in (truth, said))
    expected = sk.matthews_corrcoef(y.numpy(), q.numpy())
    assert (truth is None and said is None) or expected == 0
    values = [
        make_metrics(spec("binary", 2), "", 15)(0.2 + 0.6 * q.float(), y)["mcc"],
        make_metrics(spec("multiclass", 3), "", 15)(torch.nn.functional.one_hot(q, 3).float(), y)["mcc"],
        make_metrics(spec("multilabel", 1), "", 15)(0.2 + 0.6 * q[:, None].float(), y[:, None])["mcc"],
    ]
    assert [float(v) for v in values] == pytest.approx([expected] * 3, abs=1e-6)


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor: on a GPU each is a wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Encountered")
def test_the_mean_of_losses_is_torchmetrics_without_its_waits():
    """Values, weights and NaN as MeanMetric takes them, and the same states for checkpoints in mid-epoch."""
    torch.manual_seed(0)
    ours, theirs = LossMean(), MeanMetric()
    for size in SPLITS:
        value = torch.randn(size)
        value[::7] = float("nan")
        weight = torch.tensor(size)  # int64, as a count of letters is
        theirs.update(value, weight.expand(size).float())
        with Reads() as reads:
            ours.update(value, weight)
        assert reads.count == 0
    with Reads() as reads:
        MeanMetric().update(value)
    assert reads.count == 1  # what the test would see
    torch.testing.assert_close(ours.compute(), theirs.compute())
    assert ours.metric_state.keys() == theirs.metric_state.keys()
    unweighted = LossMean()
    unweighted.update(torch.tensor([1.0, float("nan"), 4.0]))
    assert unweighted.compute() == 2.5
    unweighted.reset()
    unweighted.update(torch.tensor(float("nan")))
    assert unweighted.compute().isnan()
