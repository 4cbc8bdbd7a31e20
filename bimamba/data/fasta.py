"""FASTA and BED files, gzipped or not."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from bimamba.data.sequences import reverse_complement

FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".fas")
BESIDE_FASTA = (".fai", ".gzi")  # indexes of FASTA files
_HEADER = re.compile(rb"^>(.*)$", re.MULTILINE)
STRANDS = {"+": False, ".": False, "-": True}


def is_fasta(path: Path) -> bool:
    """True for a file name with one of FASTA's usual endings, `.gz` apart."""
    return path.name.lower().removesuffix(".gz").endswith(FASTA_SUFFIXES)


def class_of(path: Path) -> str:
    """File name without its endings: the class of a FASTA file of one class."""
    name = path.name[: -len(".gz")] if path.name.lower().endswith(".gz") else path.name
    return Path(name).stem


def read_bytes(path: Path) -> bytes:
    """A file's content, unpacked if its name ends in `.gz`.

    Raises:
        ValueError: not to be read, or no valid gzip.
    """
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def read_fasta(path: Path, only: Collection[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """`(name, sequence)` of each record; the name is the header's first word.

    Args:
        path: the file.
        only: names of the records wanted; None: all.

    Raises:
        ValueError: no record, text before the first one, or a record without a sequence.
    """
    content = read_bytes(path)
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    headers = list(_HEADER.finditer(content))
    if not headers:
        raise ValueError(f"{path}: expected FASTA records ('>name', then the sequence), found none")
    if content[: headers[0].start()].strip():
        raise ValueError(f"{path}: expected '>' at the start of a FASTA file, got {content.lstrip()[:20]!r}")
    for number, header in enumerate(headers, 1):
        words = header.group(1).split()
        name = words[0].decode(errors="replace") if words else f"record_{number}"
        if only is not None and name not in only:
            continue
        end = headers[number].start() if number < len(headers) else len(content)
        sequence = content[header.end() : end].translate(None, b" \t\n")
        if not sequence:
            raise ValueError(f"{path}: record {number} ({name}): expected a sequence, got none")
        yield name, sequence


@dataclass(frozen=True)
class Interval:
    """One line of a BED file: 0-based, half-open, with all its fields and its line number."""

    chromosome: str
    start: int
    end: int
    reverse: bool
    fields: tuple[str, ...]
    line: int

    @property
    def name(self) -> str:
        """`chr1:100-200(-)`, as bedtools writes it."""
        return f"{self.chromosome}:{self.start}-{self.end}({'-' if self.reverse else '+'})"

    def cut(self, chromosome: bytes) -> bytes:
        """The interval's sequence, of its strand."""
        sequence = chromosome[self.start : self.end]
        return reverse_complement(sequence) if self.reverse else sequence


def read_bed(path: Path) -> tuple[list[Interval], list[str] | None]:
    """Intervals, and the column names where a line `#chrom start end …` gives them.

    Raises:
        ValueError: no interval, or a line that is none; file and line are named.
    """
    intervals, names = [], None
    text = read_bytes(path).decode(errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            header = re.split(r"\t| +", line.lstrip("#").strip())
            if not intervals and len(header) >= 3 and header[0].lower() in ("chrom", "chr", "chromosome"):
                names = header
            continue
        if not line.strip() or line.startswith(("track", "browser")):
            continue
        fields = tuple(f.strip() for f in (line.split("\t") if "\t" in line else line.split()))
        where = f"{path}: line {number}"
        if len(fields) < 3 or not fields[1].isdigit() or not fields[2].isdigit():
            raise ValueError(f"{where}: expected chromosome, start and end (BED), got {line[:60]!r}")
        start, end = int(fields[1]), int(fields[2])
        if start >= end:
            raise ValueError(f"{where}: expected start < end, got {start} and {end}")
        strand = fields[5] if len(fields) > 5 else "."
        if strand not in STRANDS:
            raise ValueError(f"{where}: column 6: expected a strand (+, - or .), got {strand!r}")
        intervals.append(Interval(fields[0], start, end, STRANDS[strand], fields, number))
    if not intervals:
        raise ValueError(f"{path}: expected BED lines, found none")
    return intervals, names
