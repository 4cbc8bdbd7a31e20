"""Random access into a FASTA file of any size: where each record lies, as `samtools faidx` writes it (`.fai`)."""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bimamba.data.fasta import FASTA_SUFFIXES, is_fasta
from bimamba.data.records import existing

NEWLINE, RETURN, HEADER = 10, 13, ord(">")
BLOCK = 1 << 24  # bytes looked at at a time: memory stays small for a genome of any size


@dataclass(frozen=True)
class FastaRecord:
    """One line of an index: name, number of bases, where the first one lies, and bases and bytes of a line."""

    name: str
    length: int
    offset: int
    line_bases: int
    line_bytes: int

    def locate(self, position: int) -> int:
        """Where in the file a base lies."""
        return self.offset + position // self.line_bases * self.line_bytes + position % self.line_bases

    @property
    def end(self) -> int:
        """Where in the file the last base ends."""
        return self.locate(self.length - 1) + 1 if self.length else self.offset


class IndexedFasta:
    """Parts of a FASTA file's records, read where they lie: the file is mapped, never loaded.

    The index is `<file>.fai`, in samtools' format; it is made where it is missing or older than the file (some
    seconds for a human genome), and kept in memory where the folder cannot be written.

    Args:
        path: an uncompressed FASTA file in which all lines of a record but the last are equally long.

    Raises:
        ValueError: no file, a gzipped one, no FASTA, lines of different lengths, or an index that does not fit.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _uncompressed(existing(path, "data.path"))
        self.index_path = self.path.with_name(f"{self.path.name}.fai")
        self.records = self._index()
        self._bytes: np.ndarray | None = None

    def __getstate__(self) -> dict[str, object]:  # each loader process maps the file by itself
        return {**self.__dict__, "_bytes": None}

    def read(self, record: int, start: int, end: int) -> np.ndarray:
        """Letters `start` to `end` (0-based, half-open) of a record, as bytes: uint8 `(end - start,)`."""
        if self._bytes is None:
            self._bytes = np.memmap(self.path, np.uint8, "r")
        r = self.records[record]
        found = self._bytes[r.locate(start) : r.locate(end - 1) + 1]
        return found[(found != NEWLINE) & (found != RETURN)]

    def _index(self) -> list[FastaRecord]:
        fresh = self.index_path.is_file() and self.index_path.stat().st_mtime >= self.path.stat().st_mtime
        if fresh:
            return read_index(self.index_path, self.path)
        records = make_index(self.path)
        write_index(records, self.index_path)
        return records


def _uncompressed(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"data.path: expected a FASTA file, got the folder {path}")
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"\x1f\x8b":
        raise ValueError(
            f"{path} is compressed (gzip or bgzip): windows are read where they lie in plain text; unpack it: "
            f"gunzip --keep {path}"
        )
    if not is_fasta(path):
        raise ValueError(f"data.path: expected a FASTA file ({', '.join(FASTA_SUFFIXES)}), got {path}")
    if head[:1] != b">":
        raise ValueError(f"{path}: expected '>' at the start of a FASTA file, got {head[:1]!r}")
    return path


def make_index(path: Path) -> list[FastaRecord]:
    """The index of a FASTA file, by one pass over it.

    Raises:
        ValueError: a record whose lines have different lengths, a blank name, a name that comes twice.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        records, at, names = [], 0, set()
        while at < len(data):
            line_end = _find(data, b"\n", at)
            words = data[at + 1 : line_end].split(None, 1)
            if not words:
                raise ValueError(f"{path}: record {len(records) + 1}: expected a name after '>', got none")
            name = words[0].decode(errors="replace")
            following = data.find(b"\n>", line_end)
            next_at = following + 1 if following >= 0 else len(data)
            records.append(_measure(data, name, min(line_end + 1, len(data)), next_at, path))
            if name in names:
                raise ValueError(f"{path}: expected different names of records, {name!r} comes twice")
            names.add(name)
            at = next_at
    return records


def _find(data: mmap.mmap, what: bytes, start: int) -> int:
    found = data.find(what, start)
    return found if found >= 0 else len(data)


def _measure(data: mmap.mmap, name: str, start: int, end: int, path: Path) -> FastaRecord:
    """The record whose sequence lies in `data[start:end]`, after a look at where its line breaks are."""
    while end > start and data[end - 1] in (NEWLINE, RETURN):
        end -= 1
    if end == start:
        return FastaRecord(name, 0, start, 1, 1)
    line_end = min(_find(data, b"\n", start), end)
    line_bytes = line_end + 1 - start
    line_bases = line_bytes - 1 - (line_end < end and data[line_end - 1] == RETURN)
    irregular = ValueError(
        f"{path}: record {name!r}: expected lines of one length, the first has {line_bases} letters, others differ; "
        "an index needs that: rewrap the file, e.g. with seqkit seq -w 60"
    )
    if line_bases < 1:
        raise irregular
    breaks = 0
    lines = max(BLOCK // line_bytes, 1) * line_bytes
    for block in range(start, end, lines):  # whole lines
        letters = np.frombuffer(data[block : min(block + lines, end)], np.uint8)
        at = np.flatnonzero(letters == NEWLINE)
        if (at % line_bytes != line_bytes - 1).any() or (letters == HEADER).any():
            raise irregular
        breaks += len(at)
    full, rest = divmod(end - start, line_bytes)
    if breaks != full:
        raise irregular
    return FastaRecord(name, full * line_bases + rest, start, line_bases, line_bytes)


def write_index(records: list[FastaRecord], path: Path) -> None:
    """Write an index, whole or not at all; nothing where the folder cannot be written."""
    if not os.access(path.parent, os.W_OK):
        return
    text = "".join(f"{r.name}\t{r.length}\t{r.offset}\t{r.line_bases}\t{r.line_bytes}\n" for r in records)
    # A name of its own: several processes may write at once.
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.chmod(name, 0o644)
    os.replace(name, path)


def read_index(path: Path, fasta: Path) -> list[FastaRecord]:
    """An index, its records checked against the file.

    Raises:
        ValueError: not an index, or not that of this file.
    """
    records, size = [], fasta.stat().st_size
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        fields = line.split("\t")
        if len(fields) != 5 or not all(f.isdigit() for f in fields[1:]):
            raise ValueError(
                f"{path}: line {number}: expected name, length, offset, bases and bytes a line, got {line!r}"
            )
        record = FastaRecord(fields[0], *map(int, fields[1:]))
        if not 0 < record.line_bases <= record.line_bytes or record.end > size:
            raise ValueError(f"{path}: line {number} is not of {fasta}, which has {size} bytes; delete {path.name}")
        records.append(record)
    if not records:
        raise ValueError(f"{path}: expected an index of {fasta}, got an empty file; delete it")
    return records
