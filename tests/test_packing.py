"""Plans of packing: every sequence once, in rows that are nearly full; and the indices that follow."""

import numpy as np
import pytest
import torch

from bimamba.packing import Packing, describe, members, mirror, packing_of, pick, plan, positions


@pytest.mark.parametrize("pack_length", [50, 64, 1000])
@pytest.mark.parametrize("n", [1, 7, 60])
def test_a_plan_puts_every_sequence_somewhere_of_its_own(n, pack_length):
    lengths = np.random.default_rng(n).integers(1, 51, n)
    row, start = plan(lengths, pack_length)
    taken = set()
    for r, s, length in zip(row, start, lengths, strict=True):
        assert s + length <= pack_length
        tokens = {(r, t) for t in range(s, s + length)}
        assert not tokens & taken
        taken |= tokens
    assert set(row) == set(range(row.max() + 1))
    for r in set(row):
        assert (np.diff(start[row == r]) > 0).all()  # the batch's order
        assert lengths[row == r].sum() == max(t for q, t in taken if q == r) + 1  # no holes


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(331, 4777, 64)
    row, start = plan(lengths, 2 * 4776)
    cells = (row.max() + 1) * (start + lengths).max()
    assert lengths.sum() / cells > 0.95 and lengths.sum() / (64 * lengths.max()) < 0.6


def test_a_sequence_longer_than_a_row():
    with pytest.raises(ValueError, match=r"data\.pack_length: expected at least the longest sequence, 9, got 8"):
        plan(np.array([3, 9]), 8)


def test_indices():
    lengths = np.array([3, 5, 1, 4])
    row, start = np.array([0, 1, 0, 0]), np.array([0, 0, 3, 4])
    packing = describe(row, start, lengths, 9)
    assert packing.seq_idx.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2, 2], [0] * 9]
    assert packing.bounds.tolist() == [[0, 3, 4, 8], [0, 5, 5, 5]] and packing.order.tolist() == [0, 3, 1, 2]
    assert packing.seq_idx.dtype == torch.int32 and packing.order.dtype == torch.int64
    assert positions(packing).tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 0, 0, 0]]
    assert pick(members(packing).sum(-1), packing).tolist() == lengths.tolist()
    back = mirror(9, None, packing, torch.device("cpu"))
    assert back.tolist() == [[2, 1, 0, 3, 7, 6, 5, 4, 8], [4, 3, 2, 1, 0, 5, 6, 7, 8]]
    mask = torch.arange(9) < torch.tensor([[8], [5]])
    assert mirror(9, mask, None, torch.device("cpu"))[1].tolist() == back[1].tolist()
    # from seq_idx and mask alone, whatever its values are: the order of rows
    values = torch.where(mask, packing.seq_idx * 2 + 1, 99)
    again = packing_of(values, mask)
    assert torch.equal(again.bounds, packing.bounds) and torch.equal(again.seq_idx, packing.seq_idx)
    assert again.order.tolist() == [0, 1, 2, 3]
    assert isinstance(again, Packing) and packing_of(packing.seq_idx).bounds[:, -1].tolist() == [9, 9]
