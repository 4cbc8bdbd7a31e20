"""One FASTA file a class."""

from __future__ import annotations

import numpy as np

from bimamba.data.fasta import BESIDE_FASTA, FASTA_SUFFIXES, class_of, is_fasta
from bimamba.data.files import left_out
from bimamba.data.records import SPLIT_ALIASES, UNSPLIT, Records, required_path
from bimamba.data.sources.image_folder import subfolders
from bimamba.data.sources.reading import fasta_records, read_sequences


class FastaClasses:
    """A folder of FASTA files (also gzipped), each the class of its name; or `train`, `val`, `test` folders of such.

    `data.path` is the folder.
    """

    def prepare(self, path: str | None, task: str | None) -> None:
        """Nothing to download."""

    def load(self, path: str | None, task: str | None) -> Records:
        """All records.

        Raises:
            ValueError: no folder, no FASTA file, one class only, or a file that is not FASTA.
        """
        root = required_path(path, "a folder with one FASTA file a class")
        if not root.is_dir():
            raise ValueError(f"data.path: expected a folder with one FASTA file a class, got the file {root}")
        folders = {SPLIT_ALIASES[p.name.lower()]: p for p in subfolders(root) if p.name.lower() in SPLIT_ALIASES}
        if not folders:
            folders = {UNSPLIT: root}
        files = {
            split: sorted(p for p in folder.iterdir() if p.is_file() and is_fasta(p) and not p.name.startswith("."))
            for split, folder in folders.items()
        }
        for split, found in files.items():
            if not found:
                raise ValueError(
                    f"{folders[split]}: expected FASTA files ({', '.join(FASTA_SUFFIXES)}, also .gz), one a class, "
                    "found none"
                )
        names = tuple(sorted({class_of(p) for found in files.values() for p in found}))
        if len(names) < 2:
            raise ValueError(f"{root}: expected at least two classes (FASTA files), got one: {names[0]!r}")
        everything = [p for found in files.values() for p in found]
        records, counts = fasta_records(everything)
        records.labels = np.repeat([names.index(class_of(p)) for p in everything], counts)
        records.label_names = names
        where = "in the folder itself" if UNSPLIT in folders else f"in {', '.join(p.name for p in folders.values())}"
        records.notes += left_out(
            root, everything, f"{', '.join(FASTA_SUFFIXES)} (also .gz), one a class, {where}", BESIDE_FASTA
        )
        of_split = np.repeat([split for split, found in files.items() for _ in found], counts)
        records.splits = {split: np.flatnonzero(of_split == split) for split in files}
        return records

    def read(self, path: str) -> Records:
        """Sequences to predict: FASTA files or tables."""
        return read_sequences(path)
