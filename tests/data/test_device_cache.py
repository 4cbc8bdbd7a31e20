"""data.cache=device: the same batches, gathered after the transfer."""

import numpy as np
import pytest
import torch
from data_files import stops, write_images

from bimamba.data import VisionDataModule
from bimamba.data.images import DeviceImages
from bimamba.data.sources import Digits, ImageFolder


def module(cache, **options):
    data = VisionDataModule(Digits(), cache=cache, batch_size=100, **options)
    data.setup("fit")
    return data


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_same_batches_as_from_memory(split):
    memory, device = module(True), module("device")
    assert device.spec == memory.spec
    pairs = zip(*(getattr(data, f"{split}_dataloader")() for data in (memory, device)), strict=True)
    for a, b in pairs:
        assert b["inputs"].shape == a["label"].shape and b["inputs"].dtype == torch.int64  # nothing else travels
        for key in ("inputs", "label"):
            mine, other = (d.transform(dict(batch), training=False)[key] for d, batch in ((memory, a), (device, b)))
            assert torch.equal(mine, other)
        assert a["id"] == b["id"]


def test_only_what_is_large_is_pinned(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaders = {cache: module(cache).train_dataloader() for cache in (True, "device")}
    assert {cache: loader.pin_memory for cache, loader in loaders.items()} == {True: True, "device": False}
    assert module("device", pin_memory=True).train_dataloader().pin_memory
    write_images(tmp_path, {"x": 5})
    predicted = VisionDataModule(Digits(), cache="device", predict=str(tmp_path))
    predicted.setup("predict")
    assert predicted.predict_dataloader().pin_memory  # they are read once, and travel themselves


def test_augmented_on_the_device_and_copied_once():
    data = module("device", augment={"crop_padding": 1})
    batch = next(iter(data.train_dataloader()))
    plain, cropped = (data.transform(dict(batch), training=t)["inputs"] for t in (False, True))
    assert plain.shape == cropped.shape and not torch.equal(plain, cropped)
    kept = data._kept(torch.device("cpu"))
    assert kept is data._kept(torch.device("cpu")) and isinstance(data.examples.inputs, DeviceImages)


def test_rows_to_predict_are_other_images(tmp_path):
    write_images(tmp_path / "train", {"a": 9, "b": 9})
    write_images(tmp_path / "new", {"x": 5}, seed=1)
    found = []
    for cache in (True, "device"):
        data = VisionDataModule(
            ImageFolder(),
            path=str(tmp_path / "train"),
            cache=cache,
            predict=str(tmp_path / "new"),
            check_duplicates=False,
        )
        data.setup("predict")
        found.append(data.transform(next(iter(data.predict_dataloader())), training=False)["inputs"].numpy())
    assert found[0].shape == (5, 3, 8, 8)
    np.testing.assert_array_equal(*found)


def test_images_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 150)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)  # 100 more are PyTorch's to give
    with stops("data.cache=device: expected images of at most half", "data.cache=true"):
        DeviceImages(torch.zeros(600, 1, 1, 1, dtype=torch.uint8)).on(torch.device("cuda"))
    with stops("data.cache: expected true, false, device or auto, got 'gpu'"):
        VisionDataModule(Digits(), cache="gpu")
