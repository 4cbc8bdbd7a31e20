"""Which rows make which batch, on which process.

Both samplers yield whole batches: the DataLoader gets them with `batch_size=None`, and the data set turns a list of
rows into a batch at once, so no row is ever collated on its own. They derive from `DistributedSampler` because
Lightning leaves such samplers alone; its own replacement would pad the evaluation sets with duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import numpy as np
from torch.utils.data import Dataset, DistributedSampler


class Draw(NamedTuple):
    """Rows of one batch, and the epoch they are drawn in (it seeds random crops made at decoding time)."""

    epoch: int
    rows: np.ndarray


class TrainBatches(DistributedSampler):
    """Shuffled batches; the order depends on seed and epoch alone, so a resumed run goes on as it would have.

    Every process draws the same number of rows and batches: where rows do not divide by `world_size`, up to
    `world_size - 1` rows of an epoch are drawn twice.

    Args:
        num_rows: size of the training set.
        batch_size: rows a batch and process.
        seed: of the shuffling.
        lengths: int64 `(num_rows,)` to bucket by: batches hold rows of similar length (sorted within windows of 50
            batches), batches come in random order. None: plain shuffling.
        drop_last: leave out the last, smaller batch.
        weights: `(num_rows,)`, how often a row is drawn relative to the others: an epoch is then `num_rows` draws with
            replacement. None: every row once.
        rank, world_size: this process, and how many there are.

    Raises:
        ValueError: `drop_last` would leave nothing.
    """

    begin = 0  # batches at the beginning that are left out: a resumed training has done them
    WINDOW = 50  # batches; enough that padding is small, few enough that batches stay mixed

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int,
        lengths: np.ndarray | None = None,
        drop_last: bool = False,
        weights: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(cast(Dataset, range(num_rows)), world_size, rank, shuffle=True, seed=seed, drop_last=drop_last)
        self.num_rows, self.batch_size, self.lengths = num_rows, batch_size, lengths
        self.chances = None if weights is None else weights / weights.sum()
        if drop_last and num_rows < batch_size * world_size:
            raise ValueError(
                f"data.drop_last: expected at least {batch_size * world_size} training rows "
                f"(batch_size {batch_size} × {world_size} processes), got {num_rows}"
            )

    def __iter__(self) -> Iterator[Draw]:
        rng = np.random.default_rng((self.seed, self.epoch))
        if self.chances is None:
            order = rng.permutation(self.num_rows)
        else:
            order = rng.choice(self.num_rows, self.num_rows, p=self.chances)
        step = self.batch_size * self.num_replicas
        if self.drop_last:
            order = order[: len(order) // step * step]
        else:
            order = np.resize(order, -(-len(order) // self.num_replicas) * self.num_replicas)
        if self.lengths is not None:
            window = step * self.WINDOW
            for start in range(0, len(order), window):
                part = order[start : start + window]
                order[start : start + window] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = [order[i : i + step] for i in range(0, len(order), step)]
        if self.lengths is not None:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        for batch in batches[self.begin :]:
            yield Draw(self.epoch, batch[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        step = self.batch_size * self.num_replicas
        return self.num_rows // step if self.drop_last else -(-self.num_rows // step)


class EvalBatches(DistributedSampler):
    """Every row exactly once over all processes, in order, with the same number of batches on each process.

    Lightning's own sampler pads with duplicates, which falsifies metrics; leaving out the padding gives processes
    different numbers of batches, and what they do together in a batch (FSDP gathers weights, `DistributedDataParallel`
    may broadcast buffers) would then wait for ever. Here processes differ by one row at most, and spread their rows
    over an equal number of batches.

    Args:
        num_rows: size of the set.
        batch_size: rows a batch and process (one more, at most, where that keeps the number of batches equal).
        lengths: as in `TrainBatches`: rows are then taken in the order of their lengths.
        rank, world_size: this process, and how many there are.

    Raises:
        ValueError: fewer rows than processes.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        lengths: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(cast(Dataset, range(num_rows)), world_size, rank, shuffle=False)
        if num_rows < world_size:
            raise ValueError(f"expected at least one row a process ({world_size}) to evaluate, got {num_rows}")
        least, most = num_rows // world_size, -(-num_rows // world_size)
        self.num_batches = min(-(-most // batch_size), least)
        order = np.arange(num_rows) if lengths is None else np.argsort(lengths, kind="stable")
        mine = order[rank::world_size]
        if world_size == 1:  # full batches and one rest, as everybody expects
            self.batches = [mine[i : i + batch_size] for i in range(0, num_rows, batch_size)]
        else:
            self.batches = np.array_split(mine, self.num_batches)

    def __iter__(self) -> Iterator[Draw]:
        return (Draw(self.epoch, rows) for rows in self.batches)

    def __len__(self) -> int:
        return len(self.batches)
