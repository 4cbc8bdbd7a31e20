"""Who draws which rows: nothing dropped, nothing twice, the same number of batches on every process."""

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from bimamba.data.samplers import EvalBatches, TrainBatches


def drawn(sampler):
    return [draw.rows.tolist() for draw in sampler]


def flat(batches):
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [8, 17, 64, 101])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_evaluation_sees_every_row_once_in_equal_numbers_of_batches(world, rows, batch):
    samplers = [EvalBatches(rows, batch, rank=r, world_size=world) for r in range(world)]
    batches = [drawn(s) for s in samplers]
    assert sorted(i for process in batches for b in process for i in b) == list(range(rows))
    assert len({len(process) for process in batches}) == 1
    assert [len(s) for s in samplers] == [len(process) for process in batches]
    assert max(len(b) for process in batches for b in process) <= batch + (world > 1)
    assert min(len(b) for process in batches for b in process) >= 1


def test_one_process_evaluates_in_order():
    assert drawn(EvalBatches(5, 2)) == [[0, 1], [2, 3], [4]]


def test_fewer_rows_than_processes_is_an_error():
    with pytest.raises(ValueError, match=r"at least one row a process \(4\) to evaluate, got 3"):
        EvalBatches(3, 2, rank=0, world_size=4)


def test_lightning_leaves_the_samplers_alone():
    assert isinstance(EvalBatches(4, 2), DistributedSampler) and isinstance(
        TrainBatches(4, 2, seed=0), DistributedSampler
    )


def test_training_order_depends_on_seed_and_epoch():
    sampler = TrainBatches(50, 8, seed=1)
    first = drawn(sampler)
    assert sorted(flat(first)) == list(range(50)) and flat(first) != list(range(50))
    assert drawn(TrainBatches(50, 8, seed=1)) == first
    assert drawn(TrainBatches(50, 8, seed=2)) != first
    sampler.set_epoch(1)
    assert drawn(sampler) != first and next(iter(sampler)).epoch == 1
    sampler.set_epoch(0)
    assert drawn(sampler) == first


@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_training_processes_share_the_rows(world, bucket):
    lengths = np.arange(50) if bucket else None
    parts = [drawn(TrainBatches(50, 4, seed=0, lengths=lengths, rank=r, world_size=world)) for r in range(world)]
    rows = [i for part in parts for b in part for i in b]
    assert set(rows) == set(range(50)) and len(rows) == -(-50 // world) * world
    assert len({len(part) for part in parts}) == 1 == len({len(flat(part)) for part in parts})
    assert len(parts[0]) == len(TrainBatches(50, 4, seed=0, rank=0, world_size=world))


def test_drop_last():
    sampler = TrainBatches(50, 8, seed=0, drop_last=True)
    assert [len(b) for b in drawn(sampler)] == [8] * 6 and len(sampler) == 6
    with pytest.raises(ValueError, match=r"at least 64 training rows \(batch_size 32 × 2 processes\), got 50"):
        TrainBatches(50, 32, seed=0, drop_last=True, rank=0, world_size=2)


def test_buckets_hold_rows_of_similar_length_in_random_order():
    lengths = np.random.default_rng(0).integers(10, 1000, 640)
    batches = drawn(TrainBatches(640, 16, seed=0, lengths=lengths))
    spread = np.mean([np.ptp(lengths[b]) for b in batches])
    plain = np.mean([np.ptp(lengths[b]) for b in drawn(TrainBatches(640, 16, seed=0))])
    assert spread < 0.1 * plain
    means = [lengths[b].mean() for b in batches]
    assert means != sorted(means)


def test_weights_decide_how_often_a_row_is_drawn():
    label = np.repeat([0, 1], [900, 100])
    weights = 1 / np.bincount(label)[label]
    parts = [drawn(TrainBatches(1000, 50, seed=0, weights=weights, rank=r, world_size=2)) for r in (0, 1)]
    rows = flat(parts[0]) + flat(parts[1])
    assert len(rows) == 1000 and 440 < label[rows].sum() < 560
    assert flat(drawn(TrainBatches(1000, 50, seed=0, weights=weights, rank=1, world_size=2))) == flat(parts[1])
