"""A simulated grammar of promoter elements: the genomic data that need no download."""

from __future__ import annotations

import numpy as np

from bimamba.data.records import Records
from bimamba.data.sequences import ByteRows
from bimamba.data.sources.reading import read_sequences

# Count matrices, rows A, C, G, T, one column a position. All four: Bucher P. (1990), "Weight matrix descriptions of
# four eukaryotic RNA polymerase II promoter elements derived from 502 unrelated promoter sequences", J. Mol. Biol.
# 212:563-578, as distributed by JASPAR's POLII collection under the accession given.
CCAAT_BOX = (  # POL004.1, 175 sites
    (56, 32, 25, 102, 51, 0, 0, 175, 119, 17, 23, 116),
    (55, 52, 47, 1, 6, 173, 174, 0, 8, 0, 90, 6),
    (12, 43, 24, 70, 99, 1, 0, 0, 21, 15, 59, 52),
    (52, 48, 79, 2, 19, 1, 1, 0, 27, 143, 3, 1),
)
GC_BOX = (  # POL003.1 (Sp1), 274 sites
    (102, 97, 50, 67, 0, 2, 54, 46, 1, 79, 23, 0, 20, 40),
    (40, 31, 6, 1, 0, 0, 170, 1, 3, 0, 17, 166, 86, 24),
    (50, 112, 154, 206, 274, 272, 0, 224, 222, 171, 192, 35, 52, 109),
    (82, 34, 64, 0, 0, 0, 50, 3, 48, 24, 42, 73, 116, 101),
)
TATA_BOX = (  # POL012.1, 389 sites; the 20 is MA0108.2's (POL012.1 has 10, which leaves its column ten sites short)
    (61, 16, 352, 3, 354, 268, 360, 222, 155, 56, 83, 82, 82, 68, 77),
    (145, 46, 0, 10, 0, 0, 3, 2, 44, 135, 147, 127, 118, 107, 101),
    (152, 18, 2, 2, 5, 0, 20, 44, 157, 150, 128, 128, 128, 139, 140),
    (31, 309, 35, 374, 30, 121, 6, 121, 33, 48, 31, 52, 61, 75, 71),
)
INITIATOR = (  # POL002.1 (cap signal), 303 sites
    (49, 0, 288, 26, 77, 67, 45, 50),
    (48, 303, 0, 81, 95, 118, 85, 96),
    (69, 0, 0, 116, 0, 46, 73, 56),
    (137, 0, 15, 80, 131, 72, 100, 101),
)
# The grammar, 5' to 3'.
ELEMENTS = {"CCAAT box": CCAAT_BOX, "GC box": GC_BOX, "TATA box": TATA_BOX, "initiator": INITIATOR}
NAMES = ("decoy", "promoter")
# Bases between neighbouring elements, from and to. TATA box to initiator is the measured one: Bucher finds the TATA box
# about 30 bases before the start of transcription, which puts some 16 bases between the two matrices. The other two are
# chosen; in nature they vary.
SPACERS = ((8, 16), (8, 16), (12, 20))
WRONG_SPACERS = ((18, 28), (18, 28), (24, 34))


class Motifs:
    """Promoters against decoys that carry the same elements.

    A promoter has CCAAT box, GC box, TATA box and initiator, in this order and at the distances `SPACERS`, anywhere in
    a random background. A decoy breaks one rule, so that neither the composition nor any single element tells:

    * order (40 %): the four elements in another order, at the right distances
    * spacing (40 %): in the right order, at the wrong distances
    * presence (20 %): one element replaced by a second copy of another

    Elements are drawn from the published matrices; of `strength` drawn sites the best-scoring one is planted, as
    functional sites score above chance. Each row is written 5' to 3': the other strand of a promoter is none, so do not
    augment by reverse complement.

    Args:
        num_train, num_val, num_test: rows of each split; half promoters, half decoys.
        length: bases of the longest row.
        length_jitter: rows are up to this much shorter.
        strength: sites drawn for each one planted.
        seed: of the generator; not the run's seed, so that runs with different seeds share their test set.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        num_train: int = 8000,
        num_val: int = 1000,
        num_test: int = 2000,
        length: int = 192,
        length_jitter: int = 16,
        strength: int = 4,
        seed: int = 0,
    ) -> None:
        least = sum(len(m[0]) for m in ELEMENTS.values()) + sum(high for _, high in WRONG_SPACERS)
        least += 2 * len(TATA_BOX[0])  # a second TATA box may stand in for the shorter initiator
        if length - length_jitter < least or length_jitter < 0:
            raise ValueError(
                f"data.source: expected length - length_jitter of at least {least} (the widest decoy), "
                f"got {length} - {length_jitter}"
            )
        if min(num_train, num_val, num_test) < 0 or num_train < 4 or strength < 1:
            raise ValueError(
                "data.source: expected num_train >= 4, num_val and num_test >= 0, strength >= 1, got "
                f"{num_train}, {num_val}, {num_test}, {strength}"
            )
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}
        self.length, self.length_jitter, self.strength, self.seed = length, length_jitter, strength, seed

    def prepare(self, path: str | None, task: str | None) -> None:
        """Nothing to download."""

    def load(self, path: str | None, task: str | None) -> Records:
        """All rows."""
        if path is not None:
            raise ValueError(f"data.path: the motifs are simulated, expected null, got {path!r}")
        rng = np.random.default_rng(self.seed)
        rows, ids, splits, labels = [], [], {}, []
        for split, n in self.sizes.items():
            if n == 0:
                continue
            splits[split] = np.arange(len(rows), len(rows) + n)
            truth = np.arange(n) % 2
            made, kinds = self._simulate(rng, truth)
            rows += made
            labels.append(truth)
            ids += [f"{split}:{i}:{kind}" for i, kind in enumerate(kinds, 1)]
        return Records(
            inputs=ByteRows.from_list(rows),
            ids=ids,
            splits=splits,
            describe=lambda row: f"motifs: row {row + 1}",
            labels=np.concatenate(labels),
            label_names=NAMES,
        )

    def read(self, path: str) -> Records:
        """Sequences to predict: FASTA files or a table."""
        return read_sequences(path)

    def _simulate(self, rng: np.random.Generator, truth: np.ndarray) -> tuple[list[bytes], list[str]]:
        n, k = len(truth), len(ELEMENTS)
        kinds = rng.choice(["order", "spacing", "presence"], n, p=[0.4, 0.4, 0.2])
        kinds[truth == 1] = "promoter"
        order = np.tile(np.arange(k), (n, 1))
        order[kinds == "order"] = _other_orders(k)[rng.integers(len(_other_orders(k)), size=(kinds == "order").sum())]
        absent = np.flatnonzero(kinds == "presence")
        place = rng.integers(k, size=len(absent))
        order[absent, place] = (place + rng.integers(1, k, size=len(absent))) % k

        low, high = np.array(SPACERS).T
        gaps = rng.integers(low, high + 1, size=(n, k - 1))
        wrong = kinds == "spacing"
        low, high = np.array(WRONG_SPACERS).T
        gaps[wrong] = rng.integers(low, high + 1, size=(wrong.sum(), k - 1))

        widths = np.array([len(matrix[0]) for matrix in ELEMENTS.values()])[order]  # n k
        steps = np.concatenate([np.zeros((n, 1), int), np.cumsum(widths[:, :-1] + gaps, axis=1)], axis=1)
        lengths = self.length - rng.integers(self.length_jitter + 1, size=n)
        starts = steps + rng.integers(lengths - steps[:, -1] - widths[:, -1] + 1)[:, None]

        bases = np.frombuffer(b"ACGT", np.uint8)
        text = bases[rng.integers(4, size=(n, self.length))]
        for element, matrix in enumerate(ELEMENTS.values()):
            row, place = np.nonzero(order == element)
            columns = starts[row, place][:, None] + np.arange(len(matrix[0]))
            text[row[:, None], columns] = bases[_draw_sites(rng, np.array(matrix), len(row), self.strength)]
        return [text[i, : lengths[i]].tobytes() for i in range(n)], kinds.tolist()


def _other_orders(k: int) -> np.ndarray:
    from itertools import permutations

    return np.array([p for p in permutations(range(k)) if p != tuple(range(k))])


def _draw_sites(rng: np.random.Generator, counts: np.ndarray, n: int, strength: int) -> np.ndarray:
    """Sites drawn column by column from a count matrix `(4, width)`: the most probable of `strength` for each of n."""
    frequencies = counts / counts.sum(0)
    edges = frequencies.cumsum(0)[:3]  # 3 width
    drawn = (rng.random((n, strength, 1, counts.shape[1])) > edges).sum(2)  # n strength width
    with np.errstate(divide="ignore"):  # a base that never occurs is never drawn either
        scores = np.log(frequencies)[drawn, np.arange(counts.shape[1])].sum(-1)  # n strength
    return drawn[np.arange(n), scores.argmax(1)]
