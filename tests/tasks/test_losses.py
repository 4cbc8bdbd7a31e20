"""Losses against torch's own, and every option that a problem does not have."""

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from bimamba.spec import DataSpec
from bimamba.tasks import SampleLoss, probabilities


def spec(problem, k):
    return DataSpec("sequence", problem, tuple("abcdefgh"[:k]), alphabet="ACGTN", max_length=9)


def test_multiclass_is_smoothed_cross_entropy_per_sample():
    logits, label = torch.randn(7, 3), torch.randint(3, (7,))
    weights = [1.0, 2.0, 0.5]
    loss = SampleLoss(spec("multiclass", 3), label_smoothing=0.1, class_weights=weights)(logits, label)
    plain = F.cross_entropy(logits, label, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(loss, plain * torch.tensor(weights)[label])


def test_binary_is_bce_with_the_weight_of_its_class():
    logits, label = torch.randn(7, 1), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    loss = SampleLoss(spec("binary", 2), pos_weight=3.0)(logits, label)
    expected = F.binary_cross_entropy_with_logits(
        logits[:, 0], label.float(), pos_weight=torch.tensor(3.0), reduction="none"
    )
    torch.testing.assert_close(loss, expected)
    smooth = SampleLoss(spec("binary", 2), label_smoothing=0.2)(logits, label)
    torch.testing.assert_close(
        smooth, F.binary_cross_entropy_with_logits(logits[:, 0], label * 0.8 + 0.1, reduction="none")
    )


def test_weights_by_the_names_of_classes():
    named = OmegaConf.create({"b": 3, "a": 0.5})  # as a configuration brings them
    assert SampleLoss(spec("binary", 2), class_weights=named).weight.tolist() == [0.5, 3.0]
    assert SampleLoss(spec("multilabel", 2), pos_weight=named).weight.tolist() == [0.5, 3.0]
    assert SampleLoss(spec("binary", 2), pos_weight={"b": 3}).weight.tolist() == [1.0, 3.0]


def test_multilabel_and_regression():
    logits, label = torch.randn(5, 3), torch.randint(2, (5, 3)).float()
    weight = torch.tensor([1.0, 2.0, 4.0])
    loss = SampleLoss(spec("multilabel", 3), pos_weight=weight.tolist())(logits, label)
    expected = F.binary_cross_entropy_with_logits(logits, label, pos_weight=weight, reduction="none").mean(-1)
    torch.testing.assert_close(loss, expected)
    target = torch.randn(5, 3)
    torch.testing.assert_close(SampleLoss(spec("regression", 3))(logits, target).mean(), F.mse_loss(logits, target))


def test_balanced_weights():
    multiclass = SampleLoss(spec("multiclass", 2), class_weights="balanced")
    multiclass.balance([30, 10], 40)
    assert multiclass.weight.tolist() == pytest.approx([40 / 60, 2.0])
    assert (multiclass.weight * torch.tensor([30, 10])).sum() / 40 == pytest.approx(1.0)  # the loss keeps its scale
    binary = SampleLoss(spec("binary", 2), pos_weight="balanced")
    binary.balance([30, 10], 40)
    assert binary.weight.tolist() == [1.0, 3.0]
    multilabel = SampleLoss(spec("multilabel", 2), pos_weight="balanced")
    multilabel.balance([30, 10], 40)
    assert multilabel.weight.tolist() == pytest.approx([1 / 3, 3.0])
    with pytest.raises(ValueError, match="every class"):
        binary.balance([40, 0], 40)


@pytest.mark.parametrize(
    ("problem", "k", "options", "message"),
    [
        ("multiclass", 3, {"label_smoothing": 1.0}, "label_smoothing"),
        ("multiclass", 3, {"class_weights": [1.0, 2.0]}, r"expected 3 positive number\(s\)"),
        ("multiclass", 3, {"class_weights": [1.0, 2.0, -1.0]}, "positive"),
        ("multiclass", 3, {"class_weights": {"a": 1, "b": 2}}, "a number for each of a, b, c, got a, b"),
        ("multiclass", 3, {"class_weights": {"a": 1, "b": 2, "x": 1}}, "for each of a, b, c, got a, b, x"),
        ("multiclass", 2, {"class_weights": {"a": 1, "b": None}}, r"expected 2 positive number\(s\)"),
        ("binary", 2, {"pos_weight": {"a": 1, "b": 2}}, "a number for each of b, got a, b"),
        ("multiclass", 3, {"class_weights": "even"}, "'balanced' or null"),
        ("multiclass", 3, {"pos_weight": 2.0}, "use class_weights"),
        ("binary", 2, {"pos_weight": [1.0, 2.0]}, r"expected 1 positive number\(s\)"),
        ("binary", 2, {"pos_weight": 2.0, "class_weights": [1.0, 2.0]}, "exclude each other"),
        ("multilabel", 3, {"class_weights": [1.0, 1.0, 1.0]}, "use pos_weight"),
        ("regression", 1, {"label_smoothing": 0.1}, "no meaning for regression"),
    ],
)
def test_bad_options(problem, k, options, message):
    with pytest.raises(ValueError, match=message):
        SampleLoss(spec(problem, k), **options)


@pytest.mark.parametrize("problem", ["binary", "multiclass", "multilabel", "regression"])
def test_probabilities_are_no_part_of_the_logits(problem):
    """Metrics keep them, and a CUDA graph writes over its output."""
    logits = torch.randn(3, 1 if problem == "binary" else 2)
    spec = DataSpec("sequence", problem, ("a", "b"), alphabet="N", max_length=1)
    assert probabilities(spec, logits).untyped_storage().data_ptr() != logits.untyped_storage().data_ptr()


def test_probabilities():
    logits = torch.randn(4, 3, dtype=torch.bfloat16)
    assert probabilities(spec("multiclass", 3), logits).sum(-1).tolist() == pytest.approx([1] * 4)
    assert probabilities(spec("binary", 2), logits[:, :1]).shape == (4,)
    assert probabilities(spec("regression", 3), logits).dtype == torch.float32


@pytest.mark.parametrize(("problem", "k"), [("multiclass", 3), ("binary", 2), ("multilabel", 3)])
def test_the_loss_of_mixed_labels_is_that_of_both_in_their_shares(problem, k):
    options = {"label_smoothing": 0.1, "class_weights": [1.0, 2.0, 0.5][:k]}
    if problem == "multilabel":
        options = {"label_smoothing": 0.1, "pos_weight": [1.0, 2.0, 0.5]}
    loss = SampleLoss(spec(problem, k), **options)
    logits = torch.randn(6, 1 if problem == "binary" else k)
    one, two = torch.randint(k, (6,)), torch.randint(k, (6,))
    if problem == "multilabel":
        one, two = torch.randint(2, (6, k)).float(), torch.randint(2, (6, k)).float()
    share = torch.rand(6)
    each = share * loss(logits, one) + (1 - share) * loss(logits, two)
    as_shares = [F.one_hot(y, k).float() if problem == "multiclass" else y.float() for y in (one, two)]
    s = share.view(-1, *[1] * (as_shares[0].dim() - 1))
    torch.testing.assert_close(loss(logits, s * as_shares[0] + (1 - s) * as_shares[1]), each)
