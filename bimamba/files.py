"""Files: small ones that are either whole or not there, those of one name beneath a folder, and folders for them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and then put it there: a kill leaves the file of that name as it was."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A readable JSON file, whole or not there."""
    write_whole(path, json.dumps(dict(values), indent=2, sort_keys=True) + "\n")


def make_folder(folder: Path, key: str) -> None:
    """A folder to write to, with those above it; `key` is the option that names it.

    Raises:
        ValueError: something stands in its way, or nothing may be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "no permission to write there"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise ValueError(f"{key}: expected a folder that can be made and written to, got {folder} ({reason})")


def beneath(folder: Path, name: str) -> list[Path]:
    """Files of this name in a folder and beneath it, those of a folder before those beneath it; links are followed."""
    found, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(root)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        if name in files:
            found.append(Path(root) / name)
    return found
