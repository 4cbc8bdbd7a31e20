"""MedMNIST's npz files, and the user's own with the same keys."""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np

from bimamba.data.images import PixelArray
from bimamba.data.records import SPLITS, UNSPLIT, Origins, Records, existing
from bimamba.data.sources.reading import read_images


class MedMNIST:
    """An npz file with `{train,val,test}_{images,labels}`: images uint8 `(n, h, w)` or `(n, h, w, 3)`, labels `(n, k)`
    (Yang 2023, Scientific Data 10:41). One label column: classes; several: multilabel.

    `data.path` is the file, or a folder with `<task>.npz`; without it `data.task` (pathmnist, chestmnist, …) is
    downloaded.

    Args:
        url: address of the official files, `{task}` in it stands for `data.task`.
        cache_dir: folder for the download.
    """

    def __init__(self, url: str | None = None, cache_dir: str | None = None) -> None:
        self.url, self.cache_dir = url, cache_dir

    def prepare(self, path: str | None, task: str | None) -> None:
        """Downloads the file if neither path nor an earlier download has it."""
        if path is not None:
            return
        if task is None or self.url is None or self.cache_dir is None:
            raise ValueError("expected data.path= an npz file, or data.task= a MedMNIST name (such as pathmnist)")
        file = self._cached(task)
        if not file.exists():
            download(self.url.format(task=task), file)

    def load(self, path: str | None, task: str | None) -> Records:
        """All images.

        Raises:
            ValueError: no such file, missing keys, or arrays that do not fit.
        """
        if path is None:
            self.prepare(path, task)
        file = existing(path, "data.path") if path is not None else self._cached(str(task))
        if file.is_dir():
            file = _within(file, task)
        arrays = read_npz(file)
        present = [s for s in SPLITS if f"{s}_images" in arrays or f"{s}_labels" in arrays]
        if not present:
            raise ValueError(
                f"{file}: expected arrays named train_images, train_labels, …, found {', '.join(arrays) or 'none'}"
            )
        pixels, labels, counts = [], [], []
        for split in present:
            images, targets = (_array(arrays, f"{split}_{what}", file) for what in ("images", "labels"))
            if len(images) != len(targets):
                raise ValueError(f"{file}: {len(images)} {split}_images, but {len(targets)} {split}_labels")
            pixels.append(_check_pixels(images, f"{file}: {split}_images"))
            labels.append(targets)
            counts.append(len(images))
        if len({p.shape[1:] for p in pixels}) > 1:
            raise ValueError(f"{file}: expected images of one size, got {', '.join(str(p.shape[1:]) for p in pixels)}")
        of_split = np.repeat(present, counts)
        describe = Origins([(f"{file}: {s}_images", n) for s, n in zip(present, counts, strict=True)], "image")
        return Records(
            inputs=PixelArray(np.concatenate(pixels)),
            ids=[f"{s}:{n}" for s, count in zip(present, counts, strict=True) for n in range(1, count + 1)],
            splits={split: np.flatnonzero(of_split == split) for split in present},
            describe=describe,
            labels=_labels(np.concatenate(labels)),
        )

    def read(self, path: str) -> Records:
        """Images to predict: an npz file, image files or a table."""
        return read_images(path)

    def _cached(self, task: str) -> Path:
        return Path(str(self.cache_dir)).expanduser() / f"{task}.npz"


def npz_to_predict(file: Path) -> Records:
    """Images of an npz file: those of `images` if there are, else of `test_images`, else of its only array.

    Raises:
        ValueError: no array of images.
    """
    arrays = read_npz(file)
    key: str | None = next((k for k in ("images", "test_images") if k in arrays), None)
    if key is None and len(arrays) == 1:
        key = next(iter(arrays))
    if key is None:
        raise ValueError(f"{file}: expected an array named images or test_images, found {', '.join(arrays) or 'none'}")
    pixels = _check_pixels(arrays[key], f"{file}: {key}")
    labels = arrays.get(key.replace("images", "labels")) if key.endswith("images") else None
    return Records(
        inputs=PixelArray(pixels),
        ids=[f"{file.stem}:{n}" for n in range(1, len(pixels) + 1)],
        splits={UNSPLIT: np.arange(len(pixels))},
        describe=Origins([(f"{file}: {key}", len(pixels))], "image"),
        labels=_labels(labels) if labels is not None and len(labels) == len(pixels) else None,
    )


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """All arrays.

    Raises:
        ValueError: no valid npz file.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read as npz: {error}") from error


def download(url: str, file: Path) -> None:
    """Fetches a file; an interrupted download leaves nothing under its name.

    Raises:
        ValueError: the address cannot be reached.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, partial.open("wb") as out:
            shutil.copyfileobj(answer, out)
        partial.replace(file)
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(
            f"cannot download {url}: {error}; expected a connection, or data.path= a local copy"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _within(folder: Path, task: str | None) -> Path:
    found = sorted(folder.glob("*.npz"))
    chosen = [p for p in found if p.stem == task] if task is not None else found
    if len(chosen) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ValueError(f"{folder}: expected {f'{task}.npz' if task else 'one npz file'}, found {names}")
    return chosen[0]


def _array(arrays: dict[str, np.ndarray], key: str, file: Path) -> np.ndarray:
    if key not in arrays:
        raise ValueError(f"{file}: expected an array named {key}, found {', '.join(arrays)}")
    return arrays[key]


def _check_pixels(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise ValueError(
            f"{where}: expected uint8 of shape (n, height, width) or (n, height, width, 3), "
            f"got {images.dtype} of shape {images.shape}"
        )
    return images


def _labels(labels: np.ndarray) -> np.ndarray:
    """One column: classes (int64) or a target (float64); several: float64 `(n, k)`."""
    if labels.dtype.kind in "US":
        return labels.reshape(len(labels)).astype(str).astype(object)
    if labels.ndim == 2 and labels.shape[1] > 1:
        return labels.astype(np.float64)
    flat = labels.reshape(len(labels))
    return flat.astype(np.float64) if flat.dtype.kind == "f" else flat.astype(np.int64)
