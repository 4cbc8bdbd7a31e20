"""Stems: what a token sees, sizes, and that nothing of the image's rows reaches the one-dimensional one."""

from functools import partial

import pytest
import torch

from bimamba.nn import ConvStem, PixelConvEmbedding
from bimamba.nn.stem import _conv1d
from bimamba.spec import DataSpec

IMAGE = DataSpec("image", "binary", ("no", "yes"), channels=3, height=8, width=12)


@pytest.mark.parametrize(
    ("make", "l"),
    [
        (partial(PixelConvEmbedding, channels=[4], kernel_sizes=[5, 5], strides=[1, 1]), 96),
        (partial(PixelConvEmbedding, channels=[4, 6], kernel_sizes=[9, 27, 3], strides=[1, 5, 3]), 7),
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
    layers = dict(channels=[4], kernel_sizes=[9, 9], strides=[1, 2])
    stem = PixelConvEmbedding(IMAGE, 8, **layers)
    turned = PixelConvEmbedding(DataSpec(**(vars(IMAGE) | {"height": 16, "width": 6})), 8, **layers)
    turned.load_state_dict(stem.state_dict())
    images = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(stem(images), turned(images.view(2, 3, 16, 6)))


def test_a_token_sees_its_neighbourhood_alone():
    images = torch.randn(1, 3, 8, 12, requires_grad=True)
    pixels = PixelConvEmbedding(IMAGE, 8, channels=[4], kernel_sizes=[7, 7], strides=[1, 4])
    gradient = torch.autograd.grad(pixels(images)[0, 10].sum(), images)[0].abs().sum((0, 1)).flatten()
    assert gradient.nonzero().flatten().tolist() == list(range(40 - 6, 40 + 7))
    stem = ConvStem(IMAGE, 8, channels=[4], strides=[1, 2])
    assert stem.grid == (4, 6)
    seen = torch.autograd.grad(stem(images)[0, 6 * 2 + 3].sum(), images)[0].abs().sum((0, 1)).nonzero()
    assert seen.amin(0).tolist() == [2, 4] and seen.amax(0).tolist() == [6, 8]  # 5 x 5 around row 4, column 6


@pytest.mark.parametrize(("l", "width", "stride"), [(96, 9, 2), (97, 7, 4), (98, 3, 5), (5, 11, 3)])
def test_a_stride_is_that_of_a_convolution(l, width, stride):
    x, conv = torch.randn(2, l, 6), torch.nn.Conv1d(6, 4, width, stride, padding=width // 2)
    torch.testing.assert_close(_conv1d(x, conv), conv(x.transpose(1, 2)).transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(PixelConvEmbedding, kernel_sizes=[5, 4, 5]), "odd"),
        (partial(PixelConvEmbedding, strides=[1, 0, 1]), "at least 1"),
        (partial(PixelConvEmbedding, strides=[1, 2]), "for each of the channels"),
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
