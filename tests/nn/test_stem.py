"""Stems: what a token sees, sizes, and that nothing of the image's rows reaches the one-dimensional one."""

from functools import partial

import pytest
import torch

from bimamba.nn import ConvStem, PixelConvEmbedding
from bimamba.spec import DataSpec

IMAGE = DataSpec("image", "binary", ("no", "yes"), channels=3, height=8, width=12)


@pytest.mark.parametrize(
    ("make", "l"),
    [
        (partial(PixelConvEmbedding, channels=[4], reach=[2, 0], strides=[1, 1]), 96),
        (partial(PixelConvEmbedding, channels=[4, 6], reach=[4, 13, 1], strides=[1, 5, 3]), 7),
        (partial(ConvStem, channels=[], strides=[1]), 96),
        (partial(ConvStem, channels=[4, 6], strides=[2, 1, 2]), 6),
        (partial(PixelConvEmbedding, channels=[4], reach=[2, 0], strides=[2, 1], residual=[2, 1]), 48),
        (partial(ConvStem, channels=[4], strides=[2, 1], residual=[1, 2]), 24),
    ],
)
def test_sizes_and_gradients(make, l):
    stem = make(IMAGE, 16)
    tokens = stem(torch.randn(2, 3, 8, 12))
    assert tokens.shape == (2, l, 16) and stem.positions.max_length == l
    assert tokens.is_contiguous()  # channels last all the way: no copy before the first block
    tokens.square().sum().backward()
    for name, parameter in stem.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_pixels_are_a_plain_sequence():
    """The same 96 pixels as rows of another length give the same tokens."""
    layers = dict(channels=[4], reach=[4, 4], strides=[1, 2])
    stem = PixelConvEmbedding(IMAGE, 8, **layers)
    turned = PixelConvEmbedding(DataSpec(**(vars(IMAGE) | {"height": 16, "width": 6})), 8, **layers)
    turned.load_state_dict(stem.state_dict())
    images = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(stem(images), turned(images.view(2, 3, 16, 6)))


def test_a_token_sees_its_neighbourhood_alone():
    images = torch.randn(1, 3, 8, 12, requires_grad=True)
    pixels = PixelConvEmbedding(IMAGE, 8, channels=[4], reach=[4, 9], strides=[1, 4])
    gradient = torch.autograd.grad(pixels(images)[0, 10].sum(), images)[0].abs().sum((0, 1)).flatten()
    taps = [-8, -4, -2, -1, 0, 1, 2, 4, 8]
    seen = {40 + a + b for a in taps for b in taps if abs(b) <= 4}  # an output of the second layer, seen by the first
    assert gradient.nonzero().flatten().tolist() == sorted(seen)
    stem = ConvStem(IMAGE, 8, channels=[4], strides=[1, 2])
    assert stem.grid == (4, 6)
    seen = torch.autograd.grad(stem(images)[0, 6 * 2 + 3].sum(), images)[0].abs().sum((0, 1)).nonzero()
    assert seen.amin(0).tolist() == [2, 4] and seen.amax(0).tolist() == [6, 8]  # 5 x 5 around row 4, column 6


@pytest.mark.parametrize(
    "make",
    [
        partial(PixelConvEmbedding, channels=[4], reach=[8, 2], strides=[4, 1]),
        partial(ConvStem, channels=[4], strides=[1, 1]),
    ],
)
def test_residual_layers_add_to_what_is_there(make):
    plain, deep = make(IMAGE, 8), make(IMAGE, 8, residual=[2, 0])
    missing = deep.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith("residual.0.") for name in missing)
    images = torch.randn(2, 3, 8, 12)
    assert not torch.allclose(plain(images), deep(images))
    with torch.no_grad():
        for parameter in deep.residual.parameters():
            parameter.zero_()
    torch.testing.assert_close(plain(images), deep(images))


def test_residual_layers_of_pixels_see_as_far_as_the_layer_before_them():
    stem = PixelConvEmbedding(IMAGE, 8, channels=[4], reach=[8, 1], strides=[4, 2], residual=[1, 1])
    assert stem.residual[0][0][-1].taps == [-2, -1, 0, 1, 2] and stem.residual[1][0][-1].taps == [0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(PixelConvEmbedding, reach=[5, -1, 5]), "reach: 0"),
        (partial(PixelConvEmbedding, strides=[1, 0, 1]), "at least 1"),
        (partial(PixelConvEmbedding, strides=[1, 2]), "for each of the channels"),
        (partial(ConvStem, channels=[4], strides=[1]), "a stride of 1 or 2 for each"),
        (partial(ConvStem, channels=[4], strides=[1, 3]), "a stride of 1 or 2"),
        (partial(ConvStem, channels=[4] * 3, strides=[2] * 4), "divides 8 and 12, got 16"),
        (partial(ConvStem, channels=[4], strides=[1, 2], residual=[1]), "for each of the 2 strides, got .1."),
        (partial(PixelConvEmbedding, residual=[0, -1, 0]), "0 or more"),
    ],
)
def test_bad_options(make, words):
    with pytest.raises(ValueError, match=words):
        make(IMAGE, 8)
    with pytest.raises(ValueError, match="embeds data of kind 'image'"):
        make(DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=9), 8)
