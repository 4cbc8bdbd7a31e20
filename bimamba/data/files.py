"""Files below a folder: those that count, and a word on those that were left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

# Beside any data set, whatever their ending.
_USUAL_NAMES = ("README", "LICENSE", "LICENCE", "THUMBS", "DESKTOP")


def files_below(root: Path) -> list[Path]:
    """All files below a folder, sorted; nothing hidden, at any depth. Links to folders are not followed."""
    found, folders = [], [root]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except PermissionError:
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif entry.is_file():  # known from the folder's listing: no further question to the disk
                found.append(Path(entry.path))
    return sorted(found)


def left_out(root: Path, taken: Collection[Path], expected: str, usual: Collection[str] = ()) -> list[str]:
    """One note that counts, by their endings, the files below `root` that were not taken; none where there are none.

    Args:
        root: the folder.
        taken: files that were read.
        expected: what a file had to be.
        usual: endings of files that lie beside such data and need no word.
    """
    kept = set(map(str, taken))
    counts = Counter(
        p.suffix.lower() or "without an ending"
        for p in files_below(root)
        if str(p) not in kept and p.suffix.lower() not in usual and p.stem.upper() not in _USUAL_NAMES
    )
    shown = ", ".join(f"{n} {ending}" for ending, n in counts.most_common())
    return [f"{root}: files left out: {shown}: expected {expected}"] if counts else []
