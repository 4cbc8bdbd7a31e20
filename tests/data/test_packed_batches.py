"""data.packing: every sequence once, in the order of the batch, with its own label; the same training as padded."""

import numpy as np
import pytest
import torch
from data_files import sequence_rows, stops, write_table
from runs import TINY, run

from bimamba.data import SequenceDataModule
from bimamba.data.augment import RandomShift, ReverseComplement
from bimamba.data.collate import packing_in
from bimamba.data.sources import SequenceTable


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("packed") / "x.csv", sequence_rows(120, low=5, high=60))


def module(path, **options):
    data = SequenceDataModule(SequenceTable(), path=str(path), batch_size=16, **options)
    data.setup("fit")
    return data


def unpacked(batch):
    packing = packing_in(batch)
    slots = packing.bounds.shape[1] - 1
    for place in packing.order.tolist():
        row, number = divmod(place, slots)
        first, end = packing.bounds[row, number : number + 2].tolist()
        assert (packing.seq_idx[row, first:end] == number).all() and batch["mask"][row, first:end].all()
        yield batch["inputs"][row, first:end].tolist()


def padded(batch):
    return [row[keep].tolist() for row, keep in zip(batch["inputs"], batch["mask"], strict=True)]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_batches_are_the_padded_ones_in_fewer_rows(path, split):
    loaders = [
        getattr(module(path, packing=packing, bucket=packing), f"{split}_dataloader")() for packing in (False, True)
    ]  # with packing nobody buckets
    cells, real = 0, 0
    for plain, packed in zip(*loaders, strict=True):
        assert packed["id"] == plain["id"] and torch.equal(packed["label"], plain["label"])
        assert list(unpacked(packed)) == padded(plain)
        assert packed["mask"].sum() == plain["mask"].sum() == (packed["inputs"] > 0).sum()
        assert (packed["seq_idx"].diff(dim=1) >= 0).all() and packed["seq_idx"].dtype == torch.int32
        cells, real = cells + packed["mask"].numel(), real + int(packed["mask"].sum())
    assert real / cells > 0.85


def test_rows_keep_to_pack_length_and_multiples(path):
    for batch in module(path, packing=True, pack_length=70, pad_to_multiple=8).train_dataloader():
        assert batch["inputs"].shape[1] <= 72 and batch["inputs"].shape[1] % 8 == 0
        assert batch["bounds"][:, -1].max() <= 70


def test_each_sequence_is_turned_by_itself(path):
    batch = next(iter(module(path, packing=True).train_dataloader()))
    before = list(unpacked(batch))
    torch.manual_seed(0)
    turned = ReverseComplement("ACGTN", 0.5)(batch["inputs"], batch["mask"], packing_in(batch))
    complement = {1: 4, 2: 3, 3: 2, 4: 1, 5: 5}
    flips = 0
    for old, new in zip(before, unpacked(batch | {"inputs": turned}), strict=True):
        other = [complement[t] for t in reversed(old)]
        assert new in (old, other)
        flips += new == other
    assert 0 < flips < len(before)
    assert not turned[~batch["mask"]].any()


@pytest.mark.parametrize("packing", [True, False])
def test_each_sequence_is_moved_within_its_own_place(path, packing):
    batch = next(iter(module(path, packing=packing).train_dataloader()))
    rows = unpacked if packing else padded
    torch.manual_seed(0)
    moved = RandomShift("ACGTN", 3)(batch["inputs"], batch["mask"], packing_in(batch))
    shifts = set()
    for old, new in zip(rows(batch), rows(batch | {"inputs": moved}), strict=True):
        n = len(old)
        assert len(new) == n and set(new) <= {1, 2, 3, 4, 5}
        fits = [k for k in range(-3, 4) if old[max(0, -k) : n - max(0, k)] == new[max(0, k) : n - max(0, -k)]]
        assert fits, (old, new)
        shifts |= set(fits)
    assert len(shifts) > 3 and not moved[~batch["mask"]].any()
    for wrong in (-1, 0.5):
        with stops("data.augment.shift: expected a whole number of characters, 0 or more", str(wrong)):
            RandomShift("ACGTN", wrong)
    with stops("data.augment.shift: expected an alphabet of known characters, got 'N'"):
        RandomShift("N", 1)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (dict(packing=True, pack_length=30), ["data.pack_length", "at least the longest sequence", "got 30"]),
        (dict(packing=True, pack_length=0), ["data.pack_length: expected at least 1, got 0"]),
    ],
)
def test_clear_errors(path, options, parts):
    with stops(*parts):
        module(path, **options)


def test_training_packed_is_training_padded(path, tmp_path):
    """The whole run: same losses, same metrics, same predictions in the same order."""
    found = []
    for packing in ("false", "true"):
        options = [
            "experiment=sequences_csv",
            *TINY,
            f"data.path={path}",
            f"data.packing={packing}",
            "data.bucket=false",
        ]
        options += ["trainer.max_epochs=2", "data.batch_size=16", "model.dropout=0", "model.drop_path=0"]
        found.append(run(tmp_path / packing, *options))
    from pyarrow.parquet import read_table

    a, b = (read_table(tmp_path / p / "predictions.parquet").to_pydict() for p in ("false", "true"))
    assert a["id"] == b["id"] and a["label"] == b["label"]
    score = next(k for k in a if k.startswith("probability"))
    np.testing.assert_allclose(a[score], b[score], atol=1e-4)
    for key in ("train/loss", "val/loss", "test/loss"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-4), key
