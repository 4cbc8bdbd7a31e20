"""Sequences as bytes, and as token ids: one flat array and offsets, so that a million rows are two tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from bimamba.data.collate import pack_rows, pad_rows
from bimamba.packing import Packing
from bimamba.strands import DNA, is_dna

TRUNCATE = ("none", "left", "right", "center")
_COMPLEMENT = bytes.maketrans(b"ACGTUNRYSWKMBDHVacgtunryswkmbdhv", b"TGCAANYRSWMKVHDBtgcaanyrswmkvhdb")


def reverse_complement(sequence: bytes) -> bytes:
    """The other strand, IUPAC codes and case kept."""
    return sequence.translate(_COMPLEMENT)[::-1]


@dataclass
class ByteRows:
    """Sequences as they were read: `data[offsets[i]:offsets[i + 1]]` is row i.

    Args:
        data: uint8 `(total,)`.
        offsets: int64 `(n + 1,)`.
    """

    data: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> bytes:
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes()

    @property
    def lengths(self) -> np.ndarray:
        """int64 `(n,)`."""
        return np.diff(self.offsets)

    @classmethod
    def from_list(cls, rows: Sequence[bytes]) -> ByteRows:
        """From one bytes object a row."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(r) for r in rows], out=offsets[1:])
        return cls(np.frombuffer(b"".join(rows), np.uint8), offsets)

    @classmethod
    def from_arrow(cls, column: pa.ChunkedArray, name: str, describe: Callable[[int], str]) -> ByteRows:
        """From a text column, without making a Python object a row.

        Raises:
            ValueError: the column is not text, or a row is null.
        """
        kind = column.type
        if pa.types.is_dictionary(kind):
            column, kind = column.cast(kind.value_type), kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"column {name!r}: expected sequences as text, got type {kind}")
        if column.null_count:
            row = next(i for i, valid in enumerate(column.is_valid().to_pylist()) if not valid)
            raise ValueError(f"{describe(row)}: column {name!r}: expected a sequence, got a missing value")
        data, offsets, total = [], [np.zeros(1, np.int64)], 0
        for chunk in column.cast(pa.large_string()).chunks:
            _, ends, buffer = chunk.buffers()
            bounds = np.frombuffer(ends, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            if buffer is not None:
                data.append(np.frombuffer(buffer, np.uint8)[bounds[0] : bounds[-1]])
            offsets.append(bounds[1:] - bounds[0] + total)
            total += int(bounds[-1] - bounds[0])
        return cls(np.concatenate([np.zeros(0, np.uint8), *data]), np.concatenate(offsets))

    def strip(self) -> ByteRows:
        """Without blanks at the ends of rows, which hand-made tables often carry."""
        blank = np.isin(self.data, np.frombuffer(b" \t\r\n", np.uint8))
        if not blank.any():
            return self
        return ByteRows.from_list([self[i].strip() for i in range(len(self))])


@dataclass
class TokenRows:
    """Sequences as token ids, 1 for the first character of the alphabet; 0 is left for padding.

    Args:
        tokens: uint8 `(total,)`.
        offsets: int64 `(n + 1,)`.
        unknown: how often each character that became the last token was met.
        truncated: number of rows cut to the maximal length.
    """

    tokens: torch.Tensor
    offsets: torch.Tensor
    unknown: dict[str, int]
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> torch.Tensor:
        """int64 `(n,)`."""
        return self.offsets.diff()

    def batch(self, rows: torch.Tensor, pad_to_multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 and mask bool, `(b, l)`, l the longest of these rows."""
        starts = self.offsets[rows]
        return pad_rows(self.tokens, starts, self.offsets[rows + 1] - starts, pad_to_multiple)

    def packed(
        self, rows: torch.Tensor, pack_length: int, pad_to_multiple: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, Packing]:
        """Token ids int64 and mask bool, `(r, l)`, several sequences to a row, and where each lies."""
        starts = self.offsets[rows]
        return pack_rows(self.tokens, starts, self.offsets[rows + 1] - starts, pack_length, pad_to_multiple)


def tokenise(
    rows: ByteRows,
    describe: Callable[[int], str],
    alphabet: str = DNA,
    max_length: int | None = None,
    truncate: str = "none",
) -> TokenRows:
    """Token ids of all rows by one table look-up; lower case counts as upper case, and U as T in a DNA alphabet.

    Args:
        rows: the sequences.
        describe: `row -> "file: row n"`, for messages.
        alphabet: characters of token 1, 2, …; the last stands for every letter that is not listed (and `*`, `-`, `.`).
        max_length: the most tokens a row may have; None: any number.
        truncate: what to do with a longer row: `"none"` raises, `"left"` and `"right"` cut that end off, `"center"`
            keeps the middle.

    Raises:
        ValueError: an empty row, a character that is no letter, or a row beyond `max_length` with `truncate="none"`.
    """
    lengths = rows.lengths
    if (lengths == 0).any():
        raise ValueError(f"{describe(int(np.argmin(lengths)))}: expected a sequence, got an empty one")
    table, known = _lookup(alphabet)
    tokens = table[rows.data]
    if len(tokens) and tokens.min() == 0:
        at = int(np.argmin(tokens))
        row = int(np.searchsorted(rows.offsets, at, side="right")) - 1
        position = at - int(rows.offsets[row]) + 1
        raise ValueError(f"{describe(row)}: expected letters, got {chr(rows.data[at])!r} at position {position}")
    counts = np.bincount(rows.data, minlength=256)
    unknown = {chr(c): int(counts[c]) for c in np.flatnonzero(counts) if not known[c]}
    starts = rows.offsets[:-1]
    longest = int(lengths.max(initial=0))
    if max_length is None or longest <= max_length:
        return TokenRows(torch.from_numpy(tokens), torch.from_numpy(rows.offsets.copy()), unknown)
    if truncate == "none":
        row = int(np.argmax(lengths))
        raise ValueError(
            f"{describe(row)}: expected at most max_length={max_length} characters, got {longest} "
            f"({int((lengths > max_length).sum())} rows are longer); raise data.max_length or set "
            "data.truncate to left, right or center"
        )
    over = np.maximum(lengths - max_length, 0)
    starts = starts + {"left": over, "right": 0 * over, "center": over // 2}[truncate]
    kept = lengths - over
    offsets = np.concatenate([[0], np.cumsum(kept)])
    source = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], kept)
    return TokenRows(torch.from_numpy(tokens[source]), torch.from_numpy(offsets), unknown, int((over > 0).sum()))


def check_alphabet(alphabet: str) -> None:
    """Raises ValueError unless the alphabet is at least two different capital letters."""
    letters = alphabet.isascii() and alphabet.isalpha() and alphabet.isupper()
    if len(alphabet) < 2 or len(set(alphabet)) != len(alphabet) or not letters:
        raise ValueError(
            "data.alphabet: expected different capital letters, the last one standing for every unknown character "
            f"(DNA: {DNA!r}), got {alphabet!r}"
        )
    if set(alphabet) == set("ACGT"):
        raise ValueError(f"data.alphabet: expected a last letter for unknown bases ({DNA!r}), got {alphabet!r}")


def token_table(alphabet: str) -> np.ndarray:
    """Token id of each byte, uint8 `(256,)`; 0 for what is no letter."""
    return _lookup(alphabet)[0]


def _lookup(alphabet: str) -> tuple[np.ndarray, np.ndarray]:
    """Token of each byte (0: not allowed), and whether it says anything: the last letter of the alphabet does not."""
    table, known = np.zeros(256, np.uint8), np.zeros(256, bool)
    letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ*-."
    table[np.frombuffer(letters + letters.lower(), np.uint8)] = len(alphabet)
    for token, letter in enumerate(alphabet, 1):
        for byte in (letter, letter.lower()):
            table[ord(byte)], known[ord(byte)] = token, token < len(alphabet)
    if is_dna(alphabet):
        for byte in "Uu":
            table[ord(byte)], known[ord(byte)] = alphabet.index("T") + 1, True
    return table, known
