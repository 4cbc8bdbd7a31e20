"""Saliency, mutagenesis, targets and logos against networks whose answer is known."""

import numpy as np
import pytest
import torch

from bimamba.explain import logos
from bimamba.explain.mutagenesis import importance, letter_heights, mutate
from bimamba.explain.saliency import gradient_times_input
from bimamba.explain.target import choose_target
from bimamba.plots import new_figure
from bimamba.spec import DataSpec

THREE = DataSpec("image", "multiclass", ("a", "b", "c"), channels=1, height=2, width=2)
DNA = DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=6)


def test_gradient_times_input_of_a_linear_score_is_each_pixels_part():
    weight = torch.randn(3, 2, 4, 5)
    images = torch.randn(3, 2, 4, 5)
    found = gradient_times_input(lambda x: (x * weight).sum((1, 2, 3)), images)
    torch.testing.assert_close(found, (images * weight).sum(1))
    with torch.no_grad():  # works there too
        assert gradient_times_input(lambda x: (x**2).sum((1, 2, 3)), images).shape == (3, 4, 5)


def test_mutagenesis_of_an_additive_score_finds_every_weight():
    weight = torch.randn(2, 6, 6)  # a table for each row, so that a wrong row shows
    calls = []

    def score(tokens, mask, row):
        calls.append(len(tokens))
        position = torch.arange(6)
        return (weight[row[:, None], position, tokens] * mask).sum(1)

    tokens = torch.tensor([[1, 2, 3, 4, 5, 1], [4, 3, 2, 1, 0, 0]])  # 5: N; 0: padding
    mask = tokens > 0
    change = mutate(score, tokens, mask, letters=4, batch_size=5, window=(1, 6))
    assert change.shape == (2, 5, 4) and max(calls) <= 5
    for row in range(2):
        for position in range(1, 6):
            for letter in range(1, 5):
                got = change[row, position - 1, letter - 1]
                if not mask[row, position]:
                    assert torch.isnan(got)
                else:
                    own = weight[row, position, tokens[row, position]]
                    torch.testing.assert_close(got, weight[row, position, letter] - own, atol=1e-5, rtol=1e-4)
    assert change[0, 0, 1] == 0  # its own letter, exactly
    value = importance(change.numpy(), tokens[:, 1:].numpy())
    expected = -change[0, 0].sum() / 3  # three other letters …
    assert value[0, 0] == pytest.approx(float(expected), abs=1e-6)
    assert value[0, 3] == pytest.approx(float(-change[0, 3].mean()), abs=1e-6)  # … and four instead of an N
    assert value[1, 3] == 0


def test_letter_heights_are_means_over_all_rows():
    value, tokens = np.array([[1.0, -2.0], [3.0, 4.0]]), np.array([[1, 2], [1, 5]])
    heights = letter_heights(value, tokens, 4)
    assert heights.tolist() == [[2.0, 0, 0, 0], [0, -1.0, 0, 0]]  # N has no column


def test_targets():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 1.0]])
    label = torch.tensor([2, 0])
    assert choose_target(THREE, "predicted", logits, label).score(logits).tolist() == [2.0, 5.0]
    assert choose_target(THREE, "label", logits, label).score(logits).tolist() == [1.0, 5.0]
    assert choose_target(THREE, "c", logits, None).names == ["c", "c"]
    binary = torch.tensor([[-3.0], [4.0]])
    target = choose_target(DNA, "predicted", binary, None)
    assert target.score(binary).tolist() == [3.0, 4.0] and target.names == ["no", "yes"]
    assert target.score(binary[:1], torch.tensor([1])).tolist() == [-3.0]  # a mutant of row 1
    with pytest.raises(ValueError, match="predicted, label or one of a, b, c, got 'd'"):
        choose_target(THREE, "d", logits, label)
    with pytest.raises(ValueError, match="one label a row, got rows without labels"):
        choose_target(THREE, "label", logits, None)
    tags = DataSpec("image", "multilabel", ("a", "b", "c"), channels=1, height=2, width=2)
    assert choose_target(tags, "predicted", logits, None).names == ["b", "a"]
    with pytest.raises(ValueError, match="got a multilabel problem"):
        choose_target(tags, "label", logits, label)


def test_a_logo_stacks_its_letters_and_turns_negative_ones_over():
    axes = new_figure(3, 2).subplots()
    heights = np.array([[0.5, 2.0, 0, 0], [0, 0, -1.5, 0]])
    logos.draw_logo(axes, heights, "ACGT", first=-1)
    boxes = {}
    for patch in axes.patches:
        box = patch.get_path().get_extents()
        boxes[patch.get_facecolor()] = (box.x0, box.y0, box.x1, box.y1)
    from matplotlib.colors import to_rgba

    assert set(boxes) == {to_rgba(logos.DNA_COLOURS[letter]) for letter in "ACG"}
    np.testing.assert_allclose(boxes[to_rgba(logos.DNA_COLOURS["A"])], (-1.48, 0, -0.52, 0.5), atol=1e-6)  # at the foot
    np.testing.assert_allclose(boxes[to_rgba(logos.DNA_COLOURS["C"])], (-1.48, 0.5, -0.52, 2.5), atol=1e-6)
    np.testing.assert_allclose(boxes[to_rgba(logos.DNA_COLOURS["G"])], (-0.48, -1.5, 0.48, 0), atol=1e-6)
    low, high = axes.get_ylim()
    assert low < -1.5 and high > 2.5
