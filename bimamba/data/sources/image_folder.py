"""Image files in one folder a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bimamba.data.files import left_out
from bimamba.data.images import BESIDE_IMAGES, IMAGE_SUFFIXES, find_images
from bimamba.data.records import SPLIT_ALIASES, UNSPLIT, Records, required_path
from bimamba.data.sources.reading import image_file_records, read_images


class ImageFolder:
    """`data.path/<class>/…/<image>`, or the same below `train`, `val` and `test` sub-folders."""

    def prepare(self, path: str | None, task: str | None) -> None:
        """Nothing to download."""

    def load(self, path: str | None, task: str | None) -> Records:
        """All images, not yet decoded.

        Raises:
            ValueError: no folder, no class folder, one class only, or a class without images.
        """
        root = required_path(path, "a folder with one sub-folder of images a class")
        if not root.is_dir():
            raise ValueError(f"data.path: expected a folder with one sub-folder of images a class, got the file {root}")
        folders = {SPLIT_ALIASES[p.name.lower()]: p for p in subfolders(root) if p.name.lower() in SPLIT_ALIASES}
        if not folders:
            folders = {UNSPLIT: root}
        names = tuple(sorted({p.name for folder in folders.values() for p in subfolders(folder)}))
        if len(names) < 2:
            raise ValueError(
                f"{root}: expected at least two class folders with images, found {', '.join(names) or 'none'}"
            )
        files, labels, splits = [], [], {}
        for split, folder in folders.items():
            first = len(files)
            for number, name in enumerate(names):
                found = find_images(folder / name) if (folder / name).is_dir() else []
                if not found and (folder / name).is_dir():
                    raise ValueError(
                        f"{folder / name}: expected images ({', '.join(IMAGE_SUFFIXES)}) of the class, found none"
                    )
                files += found
                labels += [number] * len(found)
            splits[split] = np.arange(first, len(files))
        records = image_file_records(files, root)
        records.labels, records.label_names, records.splits = np.array(labels, np.int64), names, splits
        records.notes += left_out(root, files, f"{', '.join(IMAGE_SUFFIXES)} in class folders", BESIDE_IMAGES)
        return records

    def read(self, path: str) -> Records:
        """Images to predict: files, npz or a table."""
        return read_images(path)


def subfolders(folder: Path) -> list[Path]:
    """Sub-folders in the order of their names, hidden ones apart."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
