"""Mixup and CutMix: shares of pixels and labels agree, and the shares are those asked for."""

import pytest
import torch

from bimamba.data.mix import Mix


def images(b=400, h=8, w=12):
    """Each image has one value everywhere: its own number."""
    return torch.arange(b, dtype=torch.float32)[:, None, None, None].expand(b, 3, h, w).contiguous()


def test_mixup_mixes_pixels_and_labels_in_the_same_shares():
    torch.manual_seed(0)
    x = images()
    label = torch.arange(400) % 7
    mixed, target = Mix(mixup=0.4)(x, label, 7)
    share = (mixed[1:, 0, 0, 0] - x[:-1, 0, 0, 0]) / (x[1:, 0, 0, 0] - x[:-1, 0, 0, 0])
    assert (mixed == mixed[:, :1, :1, :1]).all() and share.min() >= 0 and share.max() <= 1
    torch.testing.assert_close(target.gather(1, label[:, None])[1:, 0], share, rtol=0, atol=1e-3)
    torch.testing.assert_close(target.sum(1), torch.ones(400))
    assert share.mean() == pytest.approx(0.5, abs=0.08) and share.std() == pytest.approx((0.25 / 1.8) ** 0.5, abs=0.05)


def test_cutmix_replaces_one_rectangle_and_counts_its_pixels():
    torch.manual_seed(0)
    x = images()
    label = torch.arange(400) % 2
    mixed, target = Mix(cutmix=1.0)(x, label, None)  # binary
    own = mixed == x
    assert (own | (mixed == x.roll(1, 0))).all()
    share = own[:, 0].float().mean((1, 2))
    torch.testing.assert_close(target, share * label + (1 - share) * label.roll(1, 0))
    for keep in own[:50, 0]:
        inside = (~keep).nonzero()
        if len(inside):  # a rectangle: all pixels between its corners
            low, high = inside.min(0).values, inside.max(0).values + 1
            assert (high - low).prod() == len(inside)
    assert 0.5 < share.mean() < 0.75 and share.min() < 0.2  # half, were it not for rectangles over the edge


def test_probability_both_kinds_and_other_labels():
    torch.manual_seed(0)
    x, label = images(), torch.rand(400, 3)
    mixed, target = Mix(mixup=1.0, probability=0.25)(x, label, None)
    untouched = (mixed == x).flatten(1).all(1)
    assert untouched.float().mean() == pytest.approx(0.75, abs=0.07)
    assert torch.equal(target[untouched], label[untouched])
    kinds = {bool((Mix(mixup=1.0, cutmix=1.0)(x, label, None)[0] % 1 == 0).all()) for _ in range(12)}
    assert kinds == {True, False}
    assert not Mix().on and not Mix(mixup=1.0, probability=0.0).on


@pytest.mark.parametrize("options", [{"mixup": -1.0}, {"cutmix": -0.1}, {"probability": 1.5}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=rf"data\.mix\.{next(iter(options))}: expected"):
        Mix(**options)
