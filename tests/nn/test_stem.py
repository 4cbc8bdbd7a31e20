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
        (partial(PixelConvEmbedding, hidden=4, kernel_size=5, stride=1), 96),
        (partial(PixelConvEmbedding, hidden=4, kernel_size=27, stride=5), 20),
        (partial(ConvStem, channels=[], strides=[1]), 96),
        (partial(ConvStem, channels=[4, 6], strides=[2, 1, 2]), 6),
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
    stem = PixelConvEmbedding(IMAGE, 8, hidden=4, kernel_size=9, stride=2)
    turned = PixelConvEmbedding(DataSpec(**(vars(IMAGE) | {"height": 16, "width": 6})), 8, 4, 9, 2)
    turned.load_state_dict(stem.state_dict())
    images = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(stem(images), turned(images.view(2, 3, 16, 6)))


def test_a_token_sees_its_neighbourhood_alone():
    images = torch.randn(1, 3, 8, 12, requires_grad=True)
    pixels = PixelConvEmbedding(IMAGE, 8, hidden=4, kernel_size=7, stride=4)
    gradient = torch.autograd.grad(pixels(images)[0, 10].sum(), images)[0].abs().sum((0, 1)).flatten()
    assert gradient.nonzero().flatten().tolist() == list(range(40 - 6, 40 + 7))
    stem = ConvStem(IMAGE, 8, channels=[4], strides=[1, 2])
    assert stem.grid == (4, 6)
    seen = torch.autograd.grad(stem(images)[0, 6 * 2 + 3].sum(), images)[0].abs().sum((0, 1)).nonzero()
    assert seen.amin(0).tolist() == [2, 4] and seen.amax(0).tolist() == [6, 8]  # 5 x 5 around row 4, column 6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(PixelConvEmbedding, kernel_size=4), "odd"),
        (partial(PixelConvEmbedding, stride=0), "at least 1"),
        (partial(ConvStem, channels=[4], strides=[1]), "a stride of 1 or 2 for each"),
        (partial(ConvStem, channels=[4], strides=[1, 3]), "a stride of 1 or 2"),
        (partial(ConvStem, channels=[4] * 3, strides=[2] * 4), "divides 8 and 12, got 16"),
    ],
)
def test_bad_options(make, words):
    with pytest.raises(ValueError, match=words):
        make(IMAGE, 8)
    with pytest.raises(ValueError, match="embeds data of kind 'image'"):
        make(DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=9), 8)
