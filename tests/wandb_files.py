"""Reading back the file of an offline W&B run, record by record."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

BLOCK = 32768


def records(path: Path):
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format (crc, length, type; 32 kB blocks)."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no room for a header: the block's rest is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def finished(folder: Path) -> list:
    """All records of a folder's one run. W&B writes them in another process, which may be a moment behind."""
    deadline = time.monotonic() + 60
    found: list = []
    while not any(r.HasField("exit") for r in found):
        paths = list(folder.glob("wandb/offline-run-*/*.wandb"))
        assert len(paths) < 2, f"one run expected, got {paths}"
        assert time.monotonic() < deadline, f"{folder}: {paths} has no end after {len(found)} records"
        time.sleep(0.1)
        found = [r for path in paths for r in records(path)]
    return found


def history(found: list) -> dict[str, list]:
    """Every logged value by its key."""
    values: dict[str, list] = {}
    for record in found:
        for item in record.history.item:
            values.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    return values
