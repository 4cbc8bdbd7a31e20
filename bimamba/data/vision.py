"""Images to batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bimamba.data import preflight
from bimamba.data.augment import ImageAugmentation, normalise
from bimamba.data.collate import Batch
from bimamba.data.datamodule import ClassificationDataModule, RowDataset
from bimamba.data.images import (
    RESIZE,
    CachedImages,
    DeviceImages,
    Geometry,
    LazyImages,
    channel_statistics,
    decode_all,
    look,
)
from bimamba.data.labels import LabelMap
from bimamba.data.mix import Mix
from bimamba.data.pixels import Losses
from bimamba.data.records import Records, Source
from bimamba.spec import DataSpec

CACHE_LIMIT = 2 << 30  # bytes of decoded images that cache=auto keeps in memory: all of CIFAR, MNIST, MedMNIST-64


class VisionDataModule(ClassificationDataModule):
    """Images from any source of `bimamba.data.sources`.

    Args:
        source: where images and labels come from.
        image_size: pixels, one number or `[height, width]`; None: the images' own size, which must then be one.
        channels: 1 (grey), 3 (RGB), or None: 3 if any image has colours.
        resize, crop_fraction: see `bimamba.data.images.Geometry`.
        mean, std: of each channel, of pixels in [0, 1]; None: computed from the training images.
        cache: True: decode everything once and keep it; `"device"`: and keep a copy on the device, so that a batch is a
            gather there; False: decode at each use; `"auto"`: keep up to 2 GiB in memory.
        augment: options of `bimamba.data.augment.ImageAugmentation`.
        mix: options of `bimamba.data.mix.Mix`.
        options: those of `ClassificationDataModule`.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: int | Sequence[int] | None = None,
        channels: int | None = None,
        resize: str = "crop",
        crop_fraction: float = 1.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        cache: bool | str = "auto",
        augment: Mapping[str, Any] | None = None,
        mix: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(source, **options)
        if channels not in (None, 1, 3):
            raise ValueError(f"data.channels: expected 1, 3 or null, got {channels}")
        if resize not in RESIZE:
            raise ValueError(f"data.resize: expected one of {', '.join(RESIZE)}, got {resize!r}")
        if not 0 < crop_fraction <= 1:
            raise ValueError(f"data.crop_fraction: expected a number in (0, 1], got {crop_fraction}")
        if cache not in (True, False, "auto", "device"):
            raise ValueError(f"data.cache: expected true, false, device or auto, got {cache!r}")
        if (mean is None) != (std is None):
            raise ValueError(f"data.mean and data.std go together, got mean={mean}, std={std}")
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"data.image_size: expected pixels, or [height, width], got {image_size}")
        self.image_size, self.channels, self.resize, self.crop_fraction = size, channels, resize, crop_fraction
        self.mean, self.std, self.cache = mean, std, cache
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._pixels: dict[torch.device, torch.Tensor] = {}
        self.augmentation = ImageAugmentation(**(augment or {}))
        self.mix = Mix(**(mix or {}))

    def _geometry(self, records: Records) -> Geometry:
        if self._spec is not None:  # a checkpoint's, or the training data's when predicting
            spec = self._spec
            _check_kind(spec)
            return Geometry(*spec.image_shape, self.resize, self.crop_fraction)
        channels, size = self.channels, self.image_size
        if channels is None or size is None:
            found_channels, found_sizes = look(records.inputs)
            channels = channels or found_channels
            if size is None and len(found_sizes) > 1:
                shown = ", ".join(f"{h}×{w}" for h, w in sorted(found_sizes)[:5])
                raise ValueError(f"images of different sizes ({shown}, …): set data.image_size")
            size = size or next(iter(found_sizes))
        # `look` saw a sample; where that decided the size, the rest is held to it
        exact = self.image_size is None
        return Geometry(channels, size[0], size[1], self.resize, self.crop_fraction, exact)

    def _store(self, records: Records) -> CachedImages | LazyImages:
        geometry = self._geometry(records)
        size = len(records) * geometry.channels * geometry.height * geometry.width
        tell_colour = self.channels is None
        if self.cache == "device":
            decoded = decode_all(records.inputs, geometry, tell_colour)
            return DeviceImages(decoded.pixels, decoded.losses)
        if self.cache is True or (self.cache == "auto" and size <= CACHE_LIMIT):
            return decode_all(records.inputs, geometry, tell_colour)
        return LazyImages(
            records.inputs, geometry, self.augmentation.resized_crop, self.seed, losses=Losses(tell_colour)
        )

    def _setup_predict(self) -> None:
        super()._setup_predict()
        assert self._predicted is not None
        if isinstance(self._predicted.inputs, DeviceImages):  # read once: a copy on the device gains nothing
            self._predicted.inputs = CachedImages(self._predicted.inputs.pixels, self._predicted.inputs.losses)
        for sentence in self._predicted.inputs.losses.sentences():
            preflight.warn(f"{self.predict}: {sentence}")

    def _make_spec(self, store: CachedImages | LazyImages, names: LabelMap, train: np.ndarray) -> DataSpec:
        if isinstance(store, DeviceImages):
            store = CachedImages(store.pixels, store.losses)
        channels, height, width = store.shape
        for option in ("color_jitter", "rand_augment", "trivial_augment"):
            if getattr(self.augmentation, option) and channels != 3:
                raise ValueError(f"data.augment.{option}: expected images of 3 channels, got {channels}")
        if self.mean is None or self.std is None:  # both, or none
            mean, std = channel_statistics(store, train, self.seed)
        else:
            mean, std = tuple(self.mean), tuple(self.std)
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise ValueError(f"data.mean, data.std: expected {channels} positive numbers each, got {mean} and {std}")
        return DataSpec(
            "image",
            names.problem,
            names.class_names,
            channels=channels,
            height=height,
            width=width,
            mean=mean,
            std=std,
        )

    def _lengths(self, rows: np.ndarray) -> None:
        return None

    def transform(self, batch: Batch, training: bool) -> Batch:
        """uint8 images to float32, augmented (in training), normalised by `spec.mean` and `spec.std`, and mixed."""
        images = batch["inputs"]
        if images.dim() == 1:  # row numbers: the images are on the device already
            images = self._kept(images.device)[images]
        mean, std = self._statistics(images.device)
        if training:
            decoded_cropped = self.examples is not None and isinstance(self.examples.inputs, LazyImages)
            images = self.augmentation(images, mean, crop=not decoded_cropped)
        batch["inputs"] = normalise(images, mean, std)
        if training and self.mix.on:
            classes = len(self.spec.class_names) if self.spec.problem == "multiclass" else None
            batch["inputs"], batch["label"] = self.mix(batch["inputs"], batch["label"], classes)
        return batch

    def _pins(self, dataset: RowDataset) -> bool:
        # Of images on the device numbers of rows travel, and pinning walks through the rows' names, too
        return super()._pins(dataset) and not isinstance(dataset.examples.inputs, DeviceImages)

    def _kept(self, device: torch.device) -> torch.Tensor:
        """The images of `cache=device` on this device."""
        if device not in self._pixels:
            assert self.examples is not None
            self._pixels[device] = self.examples.inputs.on(device)
        return self._pixels[device]

    def _statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation on the device; kept, since a copy from the host waits for the device."""
        if device not in self._on_device:
            spec = self.spec
            self._on_device[device] = torch.tensor(spec.mean, device=device), torch.tensor(spec.std, device=device)
        return self._on_device[device]


def _check_kind(spec: DataSpec) -> None:
    if spec.kind != "image":
        raise ValueError(f"the checkpoint expects inputs of kind {spec.kind!r}, the data are images")
