"""Images: decoding, bringing to one size, and the two ways to hold them (all decoded, or decoded when asked for)."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, get_worker_info

from bimamba.data.files import files_below
from bimamba.data.pixels import PAGES, Losses, convert, is_grey

# What Pillow decodes wherever it is installed.
IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jfif", ".jpe", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
# Files that lie in folders of images and are none: lists of labels, licences.
BESIDE_IMAGES = (".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".py")
RESIZE = ("crop", "squash")


@dataclass
class PixelArray:
    """Images that a source holds decoded: uint8 `(n, height, width)` or `(n, height, width, channels)`."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def describe(self, row: int) -> str:
        """For messages."""
        return f"image {row + 1}"

    def open(self, row: int) -> Image.Image:
        """One image."""
        return Image.fromarray(self.pixels[row].squeeze(-1) if self.pixels.shape[3:] == (1,) else self.pixels[row])


@dataclass
class EncodedImages:
    """Images as files, or as the bytes of files in a column of a table.

    Args:
        items: paths; or an Arrow column of binary, of file names, or of a struct with `bytes` and `path`.
        describe: `row -> "file: row n"`, for messages.
        root: folder that relative paths of a column start from.
    """

    items: Sequence[Path] | pa.ChunkedArray
    describe: Callable[[int], str]
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.items)

    def open(self, row: int) -> Image.Image:
        """One image, decoded, turned as its EXIF says.

        Raises:
            ValueError: no image, or one that cannot be decoded; the file (and row) is named.
        """
        item = self.items[row]
        item = item.as_py() if isinstance(item, pa.Scalar) else item
        if isinstance(item, dict):
            item = item.get("bytes") or item.get("path")
        if item is None:
            raise ValueError(f"{self.describe(row)}: expected an image, got a missing value")
        if isinstance(item, str):
            item = Path(item) if self.root is None else self.root / item
        try:
            image = Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)
            image.load()
            if image.format == "TIFF" and getattr(image, "tag_v2").next:  # noqa: B009  # of TIFF images only
                image.info[PAGES] = True  # which survives the turn below
        except FileNotFoundError as error:
            raise ValueError(f"{self.describe(row)}: expected an image, nothing is at {item}") from error
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.describe(row)}: cannot be decoded as an image: {error}") from error
        # Asking first saves 14 of 180 µs on a CIFAR image.
        return ImageOps.exif_transpose(image) if ExifTags.Base.Orientation in image.getexif() else image


@dataclass(frozen=True)
class Geometry:
    """What every image is brought to.

    Args:
        channels: 1 (grey) or 3 (RGB).
        height, width: in pixels.
        resize: `"crop"`: the shorter side is resized, keeping the proportions, and the centre cut out; `"squash"`:
            resized to height and width whatever the proportions.
        crop_fraction: with `"crop"`, the part of the resized image's side that the cut keeps (ImageNet: 224 / 256).
        exact: images of another size are an error rather than resized.
    """

    channels: int
    height: int
    width: int
    resize: str = "crop"
    crop_fraction: float = 1.0
    exact: bool = False

    def __call__(self, image: Image.Image, crop: tuple[float, float] | None = None, rng: Any = None) -> np.ndarray:
        """uint8 `(channels, height, width)`.

        Args:
            image: decoded, any mode and size.
            crop: a random crop of between these parts of the area takes the place of the central one.
            rng: a numpy generator, needed with `crop`.

        Raises:
            ValueError: another size, with `exact`.
        """
        image = convert(image, self.channels)
        target = (self.width, self.height)
        if self.exact and image.size != target:
            raise ValueError(
                f"expected {self.height}×{self.width} pixels like the others, got {image.height}×{image.width}; "
                "set data.image_size"
            )
        if crop is not None:
            box = random_box(image.width, image.height, crop, rng)
            image = image.resize(target, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        elif image.size != target or self.crop_fraction != 1.0:
            box = (0.0, 0.0, float(image.width), float(image.height))
            if self.resize == "crop":
                scale = self.crop_fraction * min(image.width / self.width, image.height / self.height)
                w, h = self.width * scale, self.height * scale
                left, top = (image.width - w) / 2, (image.height - h) / 2
                box = (left, top, left + w, top + h)
            image = image.resize(target, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def bring(images: PixelArray | EncodedImages, row: int, geometry: Geometry, losses: Losses, *crop: Any) -> np.ndarray:
    """One image as uint8 `(channels, height, width)`; `losses` takes note of what that took away, `crop` is handed on
    to the geometry.

    Raises:
        ValueError: it cannot be decoded, or has the wrong size; the file (and row) is named.
    """
    image = images.open(row)
    losses.look(image, geometry.channels, images.describe(row))
    try:
        return geometry(image, *crop)
    except ValueError as error:
        raise ValueError(f"{images.describe(row)}: {error}") from error


def random_box(width: int, height: int, area: tuple[float, float], rng: Any) -> tuple[float, float, float, float]:
    """Box of a random crop: part of the area within `area`, proportions 3/4 to 4/3 (Szegedy 2015)."""
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(target * ratio), np.sqrt(target / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)  # a very long image: its middle
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def find_images(path: Path) -> list[Path]:
    """Image files below a folder (or the file itself), sorted; nothing hidden, at any depth."""
    if path.is_file():
        return [path]
    return [p for p in files_below(path) if p.suffix.lower() in IMAGE_SUFFIXES]


def look(images: PixelArray | EncodedImages, sample: int = 256) -> tuple[int, set[tuple[int, int]]]:
    """Channels (3 if any image has colours) and the `(height, width)` met, from evenly spaced images."""
    if isinstance(images, PixelArray):
        shape = images.pixels.shape
        return (shape[3] if len(shape) == 4 else 1), {shape[1:3]}
    rows = np.unique(np.linspace(0, len(images) - 1, min(sample, len(images))).astype(int))
    opened = [images.open(int(row)) for row in rows]
    return (1 if all(map(is_grey, opened)) else 3), {(image.height, image.width) for image in opened}


@dataclass
class CachedImages:
    """All images decoded, uint8 `(n, channels, height, width)`, and what that took away."""

    pixels: torch.Tensor
    losses: Losses = field(default_factory=Losses)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def batch(self, rows: torch.Tensor, epoch: int | None = None) -> torch.Tensor:
        """uint8 `(b, channels, height, width)`."""
        return self.pixels[rows]


@dataclass
class DeviceImages(CachedImages):
    """The same, to be kept on the device of the training: a batch travels as its row numbers alone."""

    def batch(self, rows: torch.Tensor, epoch: int | None = None) -> torch.Tensor:
        """int64 `(b)`: `VisionDataModule.transform` gathers the images from the device's memory."""
        return rows

    def on(self, device: torch.device) -> torch.Tensor:
        """All images on the device.

        Raises:
            ValueError: they do not fit into its memory.
        """
        size, free = self.pixels.numel(), _free_memory(device)
        if free is not None and size > free // 2:
            raise ValueError(
                f"data.cache=device: expected images of at most half of the device's free memory, "
                f"{free / 2**31:.1f} GiB, got {size / 2**30:.1f} GiB; set data.cache=true (memory of the host)"
            )
        return self.pixels.to(device)


def _free_memory(device: torch.device) -> int | None:
    """Bytes that tensors can still take on a GPU, those among them that an earlier job's left to PyTorch."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@dataclass
class LazyImages:
    """Images decoded when a batch asks for them, in the DataLoader's workers.

    Args:
        images: where they are.
        geometry: what they are brought to.
        crop: part of the area, from and to, of a random crop in training; None: the central crop.
        seed: with the epoch and the row, decides a random crop, whichever worker makes it.
        losses: what decoding took away, of the images that this process has met.
    """

    images: PixelArray | EncodedImages
    geometry: Geometry
    crop: tuple[float, float] | None = None
    seed: int = 0
    losses: Losses = field(default_factory=Losses)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.geometry.channels, self.geometry.height, self.geometry.width

    def batch(self, rows: torch.Tensor, epoch: int | None = None) -> torch.Tensor:
        """uint8 `(b, channels, height, width)`; `epoch` is None in evaluation."""
        return torch.from_numpy(np.stack([self._one(row, epoch) for row in rows.tolist()]))

    def _one(self, row: int, epoch: int | None) -> np.ndarray:
        known = len(self.losses.found)
        crop: tuple[Any, ...] = ()
        if epoch is not None and self.crop is not None:
            crop = self.crop, np.random.default_rng((self.seed, epoch, row))
        pixels = bring(self.images, row, self.geometry, self.losses, *crop)
        # Met after the preflight has spoken; one worker's word is enough.
        worker, new = get_worker_info(), len(self.losses.found) > known
        if new and worker is not None and worker.id == 0 and (said := self.losses.sentences(of_many=False)):
            rank_zero_warn("; ".join(said))
        return pixels


def decode_all(images: PixelArray | EncodedImages, geometry: Geometry, tell_colour: bool = True) -> CachedImages:
    """Decodes every image once, on all cores; `tell_colour`: see `Losses`.

    Raises:
        ValueError: an image cannot be decoded.
    """
    shape = (geometry.channels, geometry.height, geometry.width)
    if isinstance(images, PixelArray) and geometry.crop_fraction == 1.0:
        array = images.pixels if images.pixels.ndim == 4 else images.pixels[..., None]
        array = array.transpose(0, 3, 1, 2)
        if array.shape[1:] == shape:
            return CachedImages(torch.from_numpy(np.ascontiguousarray(array)))
    pixels = torch.empty((len(images), *shape), dtype=torch.uint8)
    step = max(1, (1 << 20) // pixels[0].numel())  # 1 MB a chunk: several fit into a container's 64 MB of /dev/shm
    chunks = [range(i, min(i + step, len(images))) for i in range(0, len(images), step)]
    # Processes, since half of Pillow's work on a small image holds Python's lock: two threads gain nothing.
    workers = min(cores(), 16) if len(images) >= MANY_IMAGES else 0
    loader = DataLoader(
        _Chunks(images, geometry, tell_colour),
        sampler=chunks,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
    )
    error, losses = None, Losses(tell_colour)
    for rows, decoded in zip(chunks, loader, strict=True):
        if isinstance(decoded, ValueError):
            error = decoded
            break
        pixels[rows.start : rows.stop], met = decoded
        losses.merge(met)
    # Raised out here: an error that holds the loop's frame keeps the processes alive until they time out, after 5 s.
    if error is not None:
        raise error
    return CachedImages(pixels, losses)


MANY_IMAGES = 5000  # below it, starting processes costs more than they save (130 µs an image)


@dataclass
class _Chunks(Dataset):
    """Decoded images of a range of rows; an error comes back as a value, since a DataLoader would rewrite it."""

    images: PixelArray | EncodedImages
    geometry: Geometry
    tell_colour: bool

    def __getitem__(self, rows: range) -> tuple[torch.Tensor, Losses] | ValueError:
        losses = Losses(self.tell_colour)
        try:
            return torch.from_numpy(np.stack([bring(self.images, row, self.geometry, losses) for row in rows])), losses
        except ValueError as error:
            return error


def _as_it_is(value: Any) -> Any:
    return value


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def channel_statistics(store: CachedImages | LazyImages, rows: np.ndarray, seed: int, sample: int = 2000) -> tuple:
    """Mean and standard deviation of each channel, of pixels in [0, 1].

    From all rows where they are in memory, else from a seeded sample of them. By histogram, thus exact in float64.

    Raises:
        ValueError: every pixel of a channel has the same value.
    """
    if isinstance(store, LazyImages) and len(rows) > sample:
        rows = np.sort(np.random.default_rng(seed).choice(rows, sample, replace=False))
    counts: Any = 0
    for start in range(0, len(rows), 512):
        pixels = store.batch(torch.from_numpy(rows[start : start + 512]))
        channels = range(pixels.shape[1])
        counts = counts + np.stack([np.bincount(pixels[:, c].reshape(-1).numpy(), minlength=256) for c in channels])
    values = np.arange(256) / 255
    weights = counts / counts.sum(1, keepdims=True)
    mean = weights @ values
    std = np.sqrt((weights * (values - mean[:, None]) ** 2).sum(1))
    if (std == 0).any():
        said = f"channel {int(np.argmin(std))}: every pixel has the value {mean[np.argmin(std)]:.3g}"
        raise ValueError("; ".join([said, *store.losses.sentences()]))
    return tuple(round(float(m), 6) for m in mean), tuple(round(float(s), 6) for s in std)
