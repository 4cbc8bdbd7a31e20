"""Windows of an indexed FASTA file as batches with hidden letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from bimamba.data.collate import Batch, collate
from bimamba.data.fasta_index import IndexedFasta
from bimamba.data.masking import STRAND, mask_tokens, uniform
from bimamba.data.samplers import Draw
from bimamba.data.sequences import token_table
from bimamba.strands import complement_tokens


@dataclass(frozen=True)
class Masking:
    """How letters are hidden, see `mask_tokens`.

    Raises:
        ValueError: a share out of range.
    """

    probability: float = 0.15
    hidden: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise ValueError(f"data.masking.probability: expected a share in (0, 1], got {self.probability}")
        if min(self.hidden, self.random) < 0 or self.hidden + self.random > 1:
            raise ValueError(f"data.masking: expected hidden + random of at most 1, got {self.hidden}, {self.random}")


class Windows:
    """The windows of an indexed FASTA file, one after the other, without overlap: window i by number.

    A record's last window may be shorter; one below `least` is left out.

    Args:
        fasta: the file. length: of a window. least: of the shortest window.
        alphabet: of the token ids.
    """

    def __init__(self, fasta: IndexedFasta, length: int, least: int, alphabet: str) -> None:
        self.fasta, self.length, self.alphabet = fasta, length, alphabet
        lengths = np.array([r.length for r in fasta.records], np.int64)
        full, rest = np.divmod(lengths, length)
        self.bounds = np.concatenate([[0], np.cumsum(full + (rest >= least))])
        self.table = token_table(alphabet)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def records(self) -> np.ndarray:
        """Record of each window, int64 `(n,)`."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))

    def place(self, window: int) -> tuple[int, int, int]:
        """Record number, start and end."""
        record = int(np.searchsorted(self.bounds, window, side="right")) - 1
        start = (window - int(self.bounds[record])) * self.length
        return record, start, min(start + self.length, self.fasta.records[record].length)

    def name(self, window: int) -> str:
        """`chr1:1024-2048`."""
        record, start, end = self.place(window)
        return f"{self.fasta.records[record].name}:{start}-{end}"

    def tokens(self, window: int) -> np.ndarray:
        """Token ids, uint8 `(l,)`.

        Raises:
            ValueError: a character that is no letter.
        """
        record, start, end = self.place(window)
        letters = self.fasta.read(record, start, end)
        tokens = self.table[letters]
        if len(tokens) != end - start or tokens.min() == 0:
            at = int(np.argmin(tokens)) if len(tokens) else 0
            found = repr(chr(letters[at])) if len(tokens) == end - start else f"{len(tokens)} letters of {end - start}"
            raise ValueError(
                f"{self.fasta.path}: {self.name(window)}: expected letters, got {found} at position {start + at + 1}; "
                f"if the file was changed, delete {self.fasta.index_path.name}"
            )
        return tokens


class MaskedWindows(Dataset):
    """Some windows, masked; indexed by a whole batch at once (`Draw`, or a list of positions)."""

    def __init__(
        self, windows: Windows, rows: np.ndarray, training: bool, masking: Masking, seed: int, turned: float
    ) -> None:
        self.windows, self.rows, self.training = windows, rows, training
        self.masking, self.seed, self.turned = masking, seed, turned
        self.complement = complement_tokens(windows.alphabet).numpy() if turned else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw | Sequence[int] | int) -> Batch:
        """The batch of the given positions. Evaluated windows look the same at each epoch."""
        epoch, positions = draw if isinstance(draw, Draw) else (0, np.atleast_1d(np.asarray(draw)))
        rows = self.rows[positions]
        epoch = epoch + 1 if self.training else 0
        found = [self.windows.tokens(int(row)) for row in rows]
        if self.training and self.complement is not None:
            turn = uniform(self.seed, epoch, rows, 1, STRAND)[:, 0] < self.turned
            found = [self.complement[t[::-1]] if turned else t for t, turned in zip(found, turn, strict=True)]
        tokens = np.zeros((len(rows), max(map(len, found))), np.int64)
        for row, one in zip(tokens, found, strict=True):
            row[: len(one)] = one
        known = len(self.windows.alphabet) - 1
        m = self.masking
        read, label = mask_tokens(tokens, known, self.seed, epoch, rows, m.probability, m.hidden, m.random)
        names = [self.windows.name(int(row)) for row in rows]
        return collate(torch.from_numpy(read), names, torch.from_numpy(label), torch.from_numpy(tokens > 0))

    # What a plain DataLoader(batch_size=…) calls with the positions of a batch.
    __getitems__ = __getitem__
