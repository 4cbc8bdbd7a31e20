"""A genome as FASTA, and labelled intervals of it as BED."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bimamba.data.fasta import Interval, is_fasta, read_bed, read_fasta
from bimamba.data.records import SPLIT_ALIASES, UNSPLIT, Records, existing, group_numbers, required_path
from bimamba.data.sequences import ByteRows
from bimamba.data.sources.reading import read_sequences


class FastaBed:
    """Sequences cut out of a FASTA file at the intervals of a BED file (both may be gzipped).

    An interval with strand `-` (column 6) is read on the other strand. `data.path` is the BED file.

    Args:
        fasta: the genome.
        label_column: number (from 1) of the BED column with the label, or its name where a line `#chrom start end …`
            names the columns. The default, 4, is BED's "name".
        split_column: number or name of a column that says train, val or test; None: none does.
        val_chromosomes, test_chromosomes: chromosomes that make the validation and test set; the usual way to keep
            overlapping and homologous intervals on one side. None: stratified splits by `data.val_fraction` and
            `data.test_fraction`.
        group_column: number or name of a column whose equal values (a gene, or 1, the chromosome) stay in one split
            where splits are drawn.
    """

    def __init__(
        self,
        fasta: str | None = None,
        label_column: int | str = 4,
        split_column: int | str | None = None,
        val_chromosomes: Sequence[str] | None = None,
        test_chromosomes: Sequence[str] | None = None,
        group_column: int | str | None = None,
    ) -> None:
        if split_column is not None and (val_chromosomes or test_chromosomes):
            raise ValueError("data.source: expected either split_column or val_/test_chromosomes, got both")
        self.fasta, self.label_column, self.split_column = fasta, label_column, split_column
        self.group_column = group_column
        self.chromosomes = {"val": list(val_chromosomes or ()), "test": list(test_chromosomes or ())}

    def prepare(self, path: str | None, task: str | None) -> None:
        """Nothing to download."""

    def load(self, path: str | None, task: str | None) -> Records:
        """All intervals.

        Raises:
            ValueError: a file is missing, a line is no BED, or an interval lies outside its chromosome.
        """
        bed = required_path(path, "a BED file (data.source.fasta= is the genome)")
        intervals, header = read_bed(bed)
        records = self._cut(intervals, bed)
        column = _column(self.label_column, intervals, header, bed, "label_column")
        records.labels = _as_labels([interval.fields[column] for interval in intervals])
        records.splits = self._splits(intervals, header, bed)
        if self.group_column is not None:
            column = _column(self.group_column, intervals, header, bed, "group_column")
            values = [interval.fields[column] for interval in intervals]
            records.groups = group_numbers(values, self.group_column, records.describe)
        return records

    def read(self, path: str) -> Records:
        """Sequences to predict: a BED file of the same genome, FASTA files or a table."""
        file = existing(path, "data.predict")
        if not file.name.lower().removesuffix(".gz").endswith(".bed"):
            return read_sequences(path)
        intervals, _ = read_bed(file)
        records = self._cut(intervals, file)
        if isinstance(self.label_column, int) and all(len(i.fields) >= self.label_column for i in intervals):
            records.labels = _as_labels([interval.fields[self.label_column - 1] for interval in intervals])
        return records

    def _cut(self, intervals: list[Interval], bed: Path) -> Records:
        if self.fasta is None:
            raise ValueError("data.source.fasta is not set: expected the FASTA file that the BED intervals refer to")
        genome = existing(self.fasta, "data.source.fasta")
        if genome.is_dir() or not is_fasta(genome):
            raise ValueError(f"data.source.fasta: expected a FASTA file (.fa, .fasta, .fna, also .gz), got {genome}")
        needed = {interval.chromosome for interval in intervals}
        chromosomes = dict(read_fasta(genome, needed))
        sequences = []
        for interval in intervals:
            where = f"{bed}: line {interval.line}"
            sequence = chromosomes.get(interval.chromosome)
            if sequence is None:
                raise ValueError(f"{where}: {genome} has no record {interval.chromosome!r}{_hint(genome)}")
            if interval.end > len(sequence):
                raise ValueError(
                    f"{where}: expected an end of at most {len(sequence)} (length of {interval.chromosome}), "
                    f"got {interval.end}"
                )
            sequences.append(interval.cut(sequence))
        return Records(
            inputs=ByteRows.from_list(sequences),
            ids=[interval.name for interval in intervals],
            splits={UNSPLIT: np.arange(len(intervals))},
            describe=lambda row: f"{bed}: line {intervals[row].line}",
        )

    def _splits(self, intervals: list[Interval], header: list[str] | None, bed: Path) -> dict[str, np.ndarray]:
        if self.split_column is not None:
            column = _column(self.split_column, intervals, header, bed, "split_column")
            for interval in intervals:
                if interval.fields[column].lower() not in SPLIT_ALIASES:
                    raise ValueError(
                        f"{bed}: line {interval.line}: expected one of {', '.join(SPLIT_ALIASES)}, "
                        f"got {interval.fields[column]!r}"
                    )
            names = np.array([SPLIT_ALIASES[i.fields[column].lower()] for i in intervals])
            return {s: np.flatnonzero(names == s) for s in np.unique(names).tolist()}
        if not any(self.chromosomes.values()):
            return {UNSPLIT: np.arange(len(intervals))}
        of = np.array([i.chromosome for i in intervals])
        splits = {split: np.flatnonzero(np.isin(of, chosen)) for split, chosen in self.chromosomes.items() if chosen}
        for split, rows in splits.items():
            if len(rows) == 0:
                raise ValueError(
                    f"data.source.{split}_chromosomes: {bed} has no interval on {', '.join(self.chromosomes[split])}; "
                    f"found {', '.join(sorted(set(of.tolist()))[:10])}"
                )
        taken = np.concatenate(list(splits.values()))
        if len(np.unique(taken)) < len(taken):
            raise ValueError("data.source: val_chromosomes and test_chromosomes have chromosomes in common")
        return {"train": np.setdiff1d(np.arange(len(intervals)), taken), **splits}


def _column(column: int | str, intervals: list[Interval], header: list[str] | None, bed: Path, option: str) -> int:
    """Index of a column given by number or name."""
    if isinstance(column, str):
        if header is None or column not in header:
            found = ", ".join(header) if header else "no line '#chrom start end …' that names columns"
            raise ValueError(f"data.source.{option}: {bed}: expected the column {column!r}, found {found}")
        column = header.index(column) + 1
    for interval in intervals:
        if not 1 <= column <= len(interval.fields):
            raise ValueError(
                f"{bed}: line {interval.line}: expected a column {column} (data.source.{option}), "
                f"found {len(interval.fields)} columns"
            )
    return column - 1


def _as_labels(values: list[str]) -> np.ndarray:
    """int64 or float64 where every value is such a number, else text."""
    for kind in (int, float):
        try:
            return np.array([kind(v) for v in values], np.int64 if kind is int else np.float64)
        except ValueError:
            continue
    return np.array(values, dtype=object)


def _hint(genome: Path) -> str:
    names = []
    for name, _ in read_fasta(genome):
        names.append(name)
        if len(names) == 5:
            break
    return f" (it has {', '.join(names)}{', …' if len(names) == 5 else ''})"
