"""TrivialAugment's operations against Pillow, and which images they reach."""

import math

import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from bimamba.data import policies
from bimamba.data.policies import OPERATIONS, random_erase, trivial_augment

FILL = torch.tensor([0.5, 0.4, 0.3])


def images(b=4, h=14, w=10):
    torch.manual_seed(1)
    return torch.randint(256, (b, 3, h, w)) / 255


def pillow(change, batch, extra=()):
    made = []
    for image, *more in zip(batch, *extra, strict=True):
        array = (image * 255).round().byte().permute(1, 2, 0).numpy()
        made.append(torch.frombuffer(bytearray(change(Image.fromarray(array), *more).tobytes()), dtype=torch.uint8))
    return torch.stack(made).view(len(batch), *batch.shape[2:], 3).permute(0, 3, 1, 2) / 255


def operate(name, batch, amount):
    return policies.operate(batch, amount, [len(batch) * (name == one) for one in OPERATIONS], FILL)


AMOUNT = torch.tensor([-0.903, -0.207, 0.303, 0.999]).view(-1, 1, 1, 1)
FACTOR = (1 + policies.BLEND * AMOUNT).flatten().tolist()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("brightness", lambda i, f: ImageEnhance.Brightness(i).enhance(f)),
        ("color", lambda i, f: ImageEnhance.Color(i).enhance(f)),
        ("contrast", lambda i, f: ImageEnhance.Contrast(i).enhance(f)),
        ("sharpness", lambda i, f: ImageEnhance.Sharpness(i).enhance(f)),
        ("solarize", lambda i, f: ImageOps.solarize(i, math.ceil(255 * (1 - abs((f - 1) / policies.BLEND))))),
        ("posterize", lambda i, f: ImageOps.posterize(i, 8 - round(6 * abs((f - 1) / policies.BLEND)))),
        ("autocontrast", lambda i, f: ImageOps.autocontrast(i)),
        ("equalize", lambda i, f: ImageOps.equalize(i)),
    ],
)
def test_colours_are_pillows(name, change):
    batch = images() if name != "equalize" else images(h=40, w=40)
    got, expected = operate(name, batch, AMOUNT), pillow(change, batch, [FACTOR])
    inner = (..., slice(1, -1), slice(1, -1))  # Pillow leaves the border unsmoothed
    assert (got - expected)[inner].abs().max() <= 2.1 / 255, (got - expected)[inner].abs().max() * 255


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("translate_x", lambda x: torch.cat([x[..., 5:], x.new_zeros(*x.shape[:-1], 5)], -1)),  # half of the side
        ("translate_y", lambda x: torch.cat([x[..., 7:, :], x.new_zeros(*x.shape[:2], 7, x.shape[-1])], -2)),
        ("identity", lambda x: x),
    ],
)
def test_shifts_fill_with_the_colour(name, expected):
    batch, colour = images(), FILL[:, None, None]
    got = operate(name, batch, torch.ones(4, 1, 1, 1))
    torch.testing.assert_close(got, expected(batch - colour) + colour, atol=1e-5, rtol=0)


def test_rotation_and_shears_keep_the_centre():
    batch = images(h=9, w=9)
    for name in ("rotate", "shear_x", "shear_y"):
        got = operate(name, batch, torch.full((4, 1, 1, 1), 2 / 3))
        torch.testing.assert_close(got[..., 4, 4], batch[..., 4, 4], atol=1e-5, rtol=0)
        assert (got - batch).abs().amax((1, 2, 3)).min() > 0.1
    turned = operate("rotate", batch, torch.full((4, 1, 1, 1), 2 / 3))  # 90 degrees
    torch.testing.assert_close(turned, batch.rot90(1, (2, 3)), atol=1e-4, rtol=0)


def test_each_image_gets_the_operation_it_drew():
    batch = images(b=8 * len(OPERATIONS), h=20, w=24)
    operation = torch.arange(len(batch)) % len(OPERATIONS)
    torch.manual_seed(0)
    got = trivial_augment(batch, 1.0, FILL, operation)
    changed = (got - batch).abs().amax((1, 2, 3)) > 1e-6
    assert not changed[operation == 0].any()
    for number, name in list(enumerate(OPERATIONS))[1:]:
        assert changed[operation == number].any(), name
    torch.manual_seed(0)  # the strengths
    amount = torch.rand(len(batch), 1, 1, 1)
    amount = torch.where(torch.rand_like(amount) < 0.5, amount, -amount)
    for number, name in enumerate(OPERATIONS):
        mine = operation == number
        torch.testing.assert_close(got[mine], operate(name, batch[mine], amount[mine]), atol=1e-6, rtol=0)
    assert got.min() >= 0 and got.max() <= 1


def test_probability():
    assert trivial_augment(images(b=0), 1.0, FILL).shape == (0, 3, 14, 10)
    batch = images(b=600)
    assert torch.equal(trivial_augment(batch, 0.0, FILL), batch)
    changed = ((trivial_augment(batch, 0.5, FILL) - batch).abs().amax((1, 2, 3)) > 1e-6).float().mean()
    assert 0.38 < changed < 0.5  # identity is among the operations, and some strengths are small
    erased = ((random_erase(batch, 0.25, FILL) - batch).abs().amax((1, 2, 3)) > 1e-6).float().mean()
    assert 0.18 < erased < 0.32
