"""Augmentation of whole batches: what it may and may not change, and that the generator decides."""

import pytest
import torch
from data_files import stops

from bimamba.data import VisionDataModule
from bimamba.data.augment import ImageAugmentation, normalise, random_crop, random_flip
from bimamba.data.sources import Digits

MEAN = torch.tensor([0.5, 0.4, 0.3])


def batch(b=16, h=12, w=10):
    torch.manual_seed(1)
    return torch.randint(256, (b, 3, h, w), dtype=torch.uint8)


def test_crop_shows_a_window_of_the_padded_image():
    images = batch()
    torch.manual_seed(0)
    cropped = random_crop(images, 2)
    padded = torch.nn.functional.pad(images, (2,) * 4)
    places = set()
    for image, source in zip(cropped, padded, strict=True):
        fits = [(y, x) for y in range(5) for x in range(5) if torch.equal(image, source[:, y : y + 12, x : x + 10])]
        assert len(fits) == 1
        places.update(fits)
    assert len(places) > 5 and cropped.dtype == torch.uint8


@pytest.mark.parametrize("dim", [-1, -2])
def test_flip(dim):
    images = batch()
    assert torch.equal(random_flip(images, 1.0, dim), images.flip(dim))
    assert torch.equal(random_flip(images, 0.0, dim), images)
    torch.manual_seed(0)
    flipped = (random_flip(images, 0.5, dim) == images.flip(dim)).all((1, 2, 3))
    assert 0 < flipped.sum() < len(images)


OPTIONS = {
    "none": {},
    "crop": dict(crop_padding=2),
    "flips": dict(horizontal_flip=0.5, vertical_flip=0.5),
    "color_jitter": dict(color_jitter=[0.4, 0.4, 0.4, 0.1]),
    "rand_augment": dict(rand_augment=[2, 9]),
    "trivial_augment": dict(trivial_augment=0.9),
    "random_erasing": dict(random_erasing=0.9),
    "resized_crop": dict(resized_crop=[0.3, 1.0]),
    "all": dict(
        crop_padding=2, horizontal_flip=0.5, color_jitter=[0.2] * 3 + [0.1], rand_augment=[2, 9], random_erasing=0.5
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("b", [1, 13])
def test_shape_range_and_reproducibility(name, b):
    augment, images = ImageAugmentation(**OPTIONS[name]), batch(b)
    before = images.clone()
    torch.manual_seed(0)
    first = augment(images, MEAN)
    assert first.shape == images.shape and first.dtype == torch.float32
    assert first.min() >= 0 and first.max() <= 1 + 1e-6 and torch.equal(images, before)
    torch.manual_seed(0)
    assert torch.equal(augment(images, MEAN), first)
    if name == "none":
        assert torch.equal(first, images.float() / 255)
    elif b > 1:
        torch.manual_seed(1)
        assert not torch.equal(augment(images, MEAN), first)


def test_erased_pixels_get_the_mean_colour():
    images = batch(32)
    erased = ImageAugmentation(random_erasing=1.0)(images, MEAN)
    changed = (erased - images.float() / 255).abs().amax(1) > 1e-6
    assert changed.any((1, 2)).float().mean() > 0.5
    assert torch.allclose(erased.permute(0, 2, 3, 1)[changed], MEAN.expand(int(changed.sum()), 3), atol=1e-6)


def test_rand_augment_draws_more_than_once_a_batch():
    images = batch(1).expand(64, -1, -1, -1)
    made = ImageAugmentation(rand_augment=[1, 15])(images, MEAN)
    assert len({tuple(image.flatten().tolist()) for image in made[::8]}) > 2


def test_grey_images_too():
    images = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8)
    options = dict(crop_padding=1, horizontal_flip=0.5, random_erasing=0.5, resized_crop=[0.5, 1])
    assert ImageAugmentation(**options)(images, torch.tensor([0.3])).shape == images.shape


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (dict(crop_padding=-1), ["crop_padding", "got -1"]),
        (dict(vertical_flip=1.5), ["vertical_flip", "[0, 1]", "got 1.5"]),
        (dict(random_erasing=-1), ["random_erasing", "got -1"]),
        (dict(trivial_augment=2), ["trivial_augment", "got 2"]),
        (dict(color_jitter=[0.1]), ["color_jitter", "[brightness, contrast, saturation, hue]", "[0.1]"]),
        (dict(rand_augment=[2, 30]), ["rand_augment", "between 0 and 30", "[2, 30]"]),
        (dict(resized_crop=[0.5, 2]), ["resized_crop", "(0, 1]", "[0.5, 2]"]),
    ],
)
def test_options_out_of_range(options, parts):
    with stops(*parts):
        ImageAugmentation(**options)


@pytest.mark.parametrize("option", ["color_jitter", "rand_augment", "trivial_augment"])
def test_colour_options_need_colours(option):
    value = {"color_jitter": [0.1] * 4, "rand_augment": [2, 9], "trivial_augment": 0.5}[option]
    with stops(f"data.augment.{option}", "expected images of 3 channels, got 1"):
        VisionDataModule(Digits(), augment={option: value}).setup("fit")


def test_normalise():
    images = batch()
    made = normalise(images, MEAN, torch.tensor([0.5, 0.25, 1.0]))
    expected = (images.double() / 255 - MEAN.double()[:, None, None]) / torch.tensor([0.5, 0.25, 1.0]).double()[
        :, None, None
    ]
    assert torch.allclose(made.double(), expected, atol=1e-5)


def test_only_training_is_augmented():
    data = VisionDataModule(Digits(), augment={"crop_padding": 2})
    data.setup("fit")
    raw = next(iter(data.val_dataloader()))
    plain = data.transform(dict(raw), training=False)["inputs"]
    mean, std = data.spec.mean[0], data.spec.std[0]
    assert torch.allclose(plain, (raw["inputs"].float() / 255 - mean) / std)
    assert not torch.allclose(data.transform(dict(raw), training=True)["inputs"], plain)
