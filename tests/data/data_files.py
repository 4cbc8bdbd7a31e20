"""Small files in every layout that users have, made on the spot."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

SHARED = Path(__file__).parents[3] / "shared" / "data"


def shared(name: str) -> Path:
    """A real data set beside the repository; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


@contextmanager
def stops(*parts: str) -> Iterator[None]:
    """The block raises a ValueError whose message holds every part."""
    with pytest.raises(ValueError) as caught:
        yield
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def dna(rng: np.random.Generator, length: int) -> str:
    """Random bases."""
    return "".join(rng.choice(list("ACGT"), length))


def sequence_rows(n: int, seed: int = 0, low: int = 20, high: int = 40, classes: int = 2) -> dict[str, list]:
    """Columns of n sequences with distinct bases and balanced integer labels."""
    rng = np.random.default_rng(seed)
    return {
        "sequence": [dna(rng, int(rng.integers(low, high + 1))) for _ in range(n)],
        "label": [i % classes for i in range(n)],
    }


def png(rng: np.random.Generator, height: int = 8, width: int = 8, channels: int = 3) -> bytes:
    """An encoded random image."""
    shape = (height, width, 3) if channels == 3 else (height, width)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def image_table(n: int, column: str, classes: int, seed: int = 0, size: int = 8, channels: int = 3) -> pa.Table:
    """Images in the Hub's schema: a struct of bytes and path, and integer labels."""
    rng = np.random.default_rng(seed)
    images = [{"bytes": png(rng, size, size, channels), "path": None} for _ in range(n)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({column: pa.array(images, kind), "label": pa.array([i % classes for i in range(n)], pa.int64())})


def write_table(path: Path, columns: dict[str, list]) -> Path:
    """A table in the format of the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        pq.write_table(pa.table(columns), path)
        return path
    rows = list(zip(*columns.values(), strict=True))
    if kind in (".csv", ".tsv"):
        mark = "," if kind == ".csv" else "\t"
        text = "\n".join(mark.join(map(str, row)) for row in [tuple(columns), *rows]) + "\n"
    else:
        import json

        text = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_fasta(path: Path, sequences: dict[str, str]) -> Path:
    """FASTA with lines of 30."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, sequence in sequences.items():
        lines += [f">{name} some description", *(sequence[i : i + 30] for i in range(0, len(sequence), 30))]
    text = "\n".join(lines).encode() + b"\n"
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_images(root: Path, classes: dict[str, int], seed: int = 0, size: int = 8) -> Path:
    """A folder of PNG files a class."""
    rng = np.random.default_rng(seed)
    for name, n in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            (root / name / f"{i:03}.png").write_bytes(png(rng, size, size))
    return root
