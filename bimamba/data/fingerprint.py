"""Whether the training rows of a checkpoint are the ones that its data give today."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from bimamba.checkpoint import DRAWN_BY, IDENTITY
from bimamba.data.images import EncodedImages, PixelArray
from bimamba.data.preflight import warn
from bimamba.data.sequences import ByteRows

SAMPLED = 1000  # rows whose content counts; of the others the names do
# Options of the source that decide which rows are trained on, beside `DRAWN_BY` of the data.
NAMED_BY = ("split_column", "split_names", "group_column", "val_chromosomes", "test_chromosomes")

# Of other rows than those of its training, by what becomes of a checkpoint.
DANGERS = {
    "resumed": "rows of its validation and test sets may be trained on from now on",
    "evaluated": "rows of its training may be among those tested",
    "teacher": "rows of its training may be among those that choose and test its student",
}


def fingerprint(rows: np.ndarray, names: bytes, content: Callable[[int], bytes]) -> dict[str, Any]:
    """Number and digest of the training rows, to be kept in checkpoints: small, and cheap for millions of rows.

    Args:
        rows: their numbers. names: of all of them, in order. content: of one row, of which a thousand are looked at.
    """
    digest = hashlib.blake2b(names, digest_size=16)
    picked = np.unique(np.linspace(0, len(rows) - 1, SAMPLED).astype(int)) if len(rows) else []
    for row in picked:
        digest.update(b"\0" + content(int(rows[row])))
    return {"rows": len(rows), "digest": digest.hexdigest()}


def content_of(inputs: Any, row: int) -> bytes:
    """A row as its source holds it, not decoded: that a library of images may do otherwise tomorrow. Of a file nothing:
    its name is the row's."""
    if isinstance(inputs, ByteRows):
        return inputs[row]
    if isinstance(inputs, PixelArray):
        return inputs.pixels[row].tobytes()
    item = inputs.items[row] if isinstance(inputs, EncodedImages) else None
    item = item.as_py() if isinstance(item, pa.Scalar) else item
    item = item.get("bytes") if isinstance(item, dict) else item
    return item if isinstance(item, bytes) else b""


def compare(
    checkpoint: Mapping[str, Any],
    found: Mapping[str, Any],
    data: Mapping[str, Any],
    use: str,
    name: str = "the checkpoint",
) -> None:
    """Warn where the data are those that a checkpoint was trained on, and the training rows are not.

    Args:
        checkpoint: as read; those of earlier versions hold no fingerprint.
        found: the fingerprint of now. data: the data's configuration, resolved.
        use: what becomes of the checkpoint, one of `DANGERS`. name: of the checkpoint, for the message.
    """
    then, before = checkpoint.get("splits"), checkpoint.get("config", {}).get("data")
    if not then or not before or then == found or _identity(before) != _identity(data):
        return
    old, new = _options(before), _options(data)
    others = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if others:
        said = ", ".join(f"data.{key}={new.get(key)}" for key in others)
        how = f"{said}; the old rows come with {', '.join(f'data.{key}={old.get(key)}' for key in others)}"
    else:
        how = "the data themselves have changed since; the old rows come with the data as they were"
    warn(
        f"{name} was trained on other rows of these data ({then.get('rows')}, and there are {found['rows']} training "
        f"rows now): {DANGERS[use]} ({how})"
    )


def _identity(data: Mapping[str, Any]) -> dict[str, Any]:
    """What says that two configurations mean the same data, however they are split."""
    source = {k: v for k, v in (data.get("source") or {}).items() if k not in NAMED_BY}
    path = data.get("path")
    where = os.path.realpath(os.path.expanduser(path)) if path else None
    return {name: data.get(name) for name in IDENTITY} | {"source": source, "path": where}


def _options(data: Mapping[str, Any]) -> dict[str, Any]:
    source = {f"source.{k}": v for k, v in (data.get("source") or {}).items() if k in NAMED_BY}
    return {k: v for k, v in data.items() if k in DRAWN_BY} | source
