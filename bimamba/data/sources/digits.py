"""scikit-learn's handwritten digits: the vision data that need no download."""

from __future__ import annotations

import numpy as np

from bimamba.data.images import PixelArray
from bimamba.data.records import UNSPLIT, Records
from bimamba.data.sources.reading import read_images


class Digits:
    """1,797 grey images of 8 × 8 (Alpaydin & Kaynak 1998, the test part of UCI "Optical Recognition of Handwritten
    Digits", as `sklearn.datasets.load_digits` ships it). Grey values 0 to 16 are spread over 0 to 255.

    There is no official split: published figures differ by it (SVC 0.969 on the unshuffled 50/50 split, 0.991 on a
    stratified 80/20 one). Here `data.test_fraction` makes a stratified one.
    """

    def prepare(self, path: str | None, task: str | None) -> None:
        """Nothing to download."""

    def load(self, path: str | None, task: str | None) -> Records:
        """All images."""
        if path is not None:
            raise ValueError(f"data.path: the digits come with scikit-learn, expected null, got {path!r}")
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        return Records(
            inputs=PixelArray(pixels),
            ids=[f"digit:{n}" for n in range(1, len(pixels) + 1)],
            splits={UNSPLIT: np.arange(len(pixels))},
            describe=lambda row: f"digits: image {row + 1}",
            labels=digits.target.astype(np.int64),
            label_names=tuple(str(d) for d in range(10)),
        )

    def read(self, path: str) -> Records:
        """Images to predict: files, npz or a table."""
        return read_images(path)
