"""Sequences to batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from bimamba.data.augment import RandomShift, RandomSubstitution, ReverseComplement
from bimamba.data.collate import Batch, packing_in
from bimamba.data.datamodule import ClassificationDataModule
from bimamba.data.labels import LabelMap
from bimamba.data.records import Records, Source
from bimamba.data.sequences import TRUNCATE, TokenRows, check_alphabet, tokenise
from bimamba.spec import DataSpec
from bimamba.strands import DNA


class SequenceDataModule(ClassificationDataModule):
    """Sequences from any source of `bimamba.data.sources`.

    Args:
        source: where sequences and labels come from.
        alphabet: capital letters of token 1, 2, …; the last stands for every unknown character.
        max_length: the most characters a sequence may have; None: the longest one of the data.
        truncate: what happens to longer ones: `none` (an error), `left`, `right` (that end is cut off), `center` (the
            middle is kept).
        bucket: batches of similar length, to save padding; packing, which leaves none, shuffles plainly.
        pad_to_multiple: lengths of batches are multiples of this.
        packing: several sequences to a row (see `bimamba.packing`): `batch_size` still counts sequences, and a batch
            has the rows that these fill.
        pack_length: the most tokens of a packed row; None: four times the longest sequence, which leaves 1 to 2 % of
            padding with 64 sequences of 331 to 4,776 tokens.
        augment: in training, `reverse_complement`, the probability of reading a row on the other strand, `shift`, by
            how many characters it is moved at most, and `substitution`, the probability of drawing a character anew.
        options: those of `ClassificationDataModule`.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        source: Source,
        *,
        alphabet: str = DNA,
        max_length: int | None = None,
        truncate: str = "none",
        bucket: bool = False,
        pad_to_multiple: int = 1,
        packing: bool = False,
        pack_length: int | None = None,
        augment: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(source, **options)
        check_alphabet(alphabet)
        if truncate not in TRUNCATE:
            raise ValueError(f"data.truncate: expected one of {', '.join(TRUNCATE)}, got {truncate!r}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"data.max_length: expected at least 1, got {max_length}")
        if pad_to_multiple < 1:
            raise ValueError(f"data.pad_to_multiple: expected at least 1, got {pad_to_multiple}")
        self.alphabet, self.max_length, self.truncate = alphabet, max_length, truncate
        if pack_length is not None and pack_length < 1:
            raise ValueError(f"data.pack_length: expected at least 1, got {pack_length}")
        self.bucket, self.pad_to_multiple = bucket, pad_to_multiple
        self.packing, self.pack_length = packing, pack_length
        self.augmentations = _augmentations(alphabet, **(augment or {}))

    def _store(self, records: Records) -> TokenRows:
        alphabet, max_length = self.alphabet, self.max_length
        if self._spec is not None:  # a checkpoint's, or the training data's when predicting
            if self._spec.kind != "sequence":
                raise ValueError(f"the checkpoint expects inputs of kind {self._spec.kind!r}, the data are sequences")
            alphabet, max_length = self._spec.letters, self._spec.longest
        store = tokenise(records.inputs, records.describe, alphabet, max_length, self.truncate)
        longest, room = int(store.lengths.max()), self.pack_length
        if self.packing and room is not None and longest > room:
            raise ValueError(f"data.pack_length: expected at least the longest sequence, {longest}, got {room}")
        return store

    def _make_spec(self, store: TokenRows, names: LabelMap, train: np.ndarray) -> DataSpec:
        longest = self.max_length or int(store.lengths.max())
        return DataSpec("sequence", names.problem, names.class_names, alphabet=self.alphabet, max_length=longest)

    def _lengths(self, rows: np.ndarray) -> np.ndarray | None:
        assert self.examples is not None
        return self.examples.inputs.lengths.numpy()[rows] if self.bucket and not self.packing else None

    def _dataset_options(self) -> dict[str, Any]:
        options = {"pad_to_multiple": self.pad_to_multiple}
        if self.packing:
            options["pack_length"] = self.pack_length or 4 * self.spec.longest
        return options

    def transform(self, batch: Batch, training: bool) -> Batch:
        """Token ids, augmented in training."""
        for augmentation in self.augmentations if training else ():
            batch["inputs"] = augmentation(batch["inputs"], batch["mask"], packing_in(batch))
        return batch


def _augmentations(
    alphabet: str, reverse_complement: float = 0.0, shift: int = 0, substitution: float = 0.0
) -> list[nn.Module]:
    made: list[nn.Module] = []
    if reverse_complement:
        made.append(ReverseComplement(alphabet, reverse_complement))
    if shift:
        made.append(RandomShift(alphabet, shift))
    if substitution:
        made.append(RandomSubstitution(alphabet, substitution))
    return made
