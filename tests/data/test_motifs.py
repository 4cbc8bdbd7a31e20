"""The simulated grammar: its matrices are the published ones, and no rule can be told by composition."""

import numpy as np
import pytest
from data_files import stops

from bimamba.data import SequenceDataModule
from bimamba.data.sources import Motifs
from bimamba.data.sources.motifs import ELEMENTS, SPACERS, WRONG_SPACERS, _draw_sites


@pytest.fixture(scope="module")
def records():
    return Motifs(num_train=4000, num_val=100, num_test=1000).load(None, None)


def test_sizes_and_balance(records):
    assert {k: len(v) for k, v in records.splits.items()} == {"train": 4000, "val": 100, "test": 1000}
    for rows in records.splits.values():
        assert records.labels[rows].mean() == 0.5
    assert records.inputs.lengths.min() >= 176 and records.inputs.lengths.max() == 192
    assert set(records.inputs.data.tolist()) == set(b"ACGT")


def test_the_seed_decides():
    small = dict(num_train=20, num_val=4, num_test=4)
    first, same, other = (Motifs(**small, seed=s).load(None, None) for s in (0, 0, 1))
    assert np.array_equal(first.inputs.data, same.inputs.data)
    assert not np.array_equal(first.inputs.data[:500], other.inputs.data[:500])


def test_number_of_sites_in_the_published_matrices():
    """Bucher 1990: 175 CCAAT boxes, 274 GC boxes, 389 TATA boxes, 303 cap signals; every column sums to it (±1)."""
    sites = {"CCAAT box": 175, "GC box": 274, "TATA box": 389, "initiator": 303}
    widths = {"CCAAT box": 12, "GC box": 14, "TATA box": 15, "initiator": 8}
    for name, matrix in ELEMENTS.items():
        sums = np.array(matrix).sum(0)
        assert len(sums) == widths[name] and np.abs(sums - sites[name]).max() <= 1, (name, sums)


def test_consensus_of_the_matrices():
    read = {name: "".join("ACGT"[i] for i in np.array(m).argmax(0)) for name, m in ELEMENTS.items()}
    assert "CCAAT" in read["CCAAT box"] and "GGGCGG" in read["GC box"]
    assert "TATAAA" in read["TATA box"] and read["initiator"].startswith("TCA")


def test_sites_follow_the_matrix():
    counts = np.array(ELEMENTS["TATA box"])
    drawn = _draw_sites(np.random.default_rng(0), counts, 20000, strength=1)
    found = np.stack([(drawn == base).mean(0) for base in range(4)])
    assert np.abs(found - counts / counts.sum(0)).max() < 0.015
    strong = _draw_sites(np.random.default_rng(0), counts, 2000, strength=4)
    consensus = counts.argmax(0)
    assert (strong == consensus).mean() > (drawn == consensus).mean() + 0.05


def find(sequence, element):
    """Start of the best-scoring window."""
    counts = np.array(ELEMENTS[element]) + 0.5
    weights = np.log(counts / counts.sum(0) * 4)
    bases = np.searchsorted(np.frombuffer(b"ACGT", np.uint8), np.frombuffer(sequence, np.uint8))
    width = weights.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(bases, width)
    return int(weights[windows, np.arange(width)].sum(1).argmax())


def kinds_of(records):
    return np.array([name.split(":")[2] for name in records.ids])


def test_order_and_spacing_are_what_the_kind_says(records):
    """Measured on the strong elements, found by scanning: GC box to TATA box."""
    kinds = kinds_of(records)
    width = len(ELEMENTS["GC box"][0])
    for kind, low, high in (("promoter", *SPACERS[1]), ("spacing", *WRONG_SPACERS[1])):
        gaps = []
        for row in np.flatnonzero(kinds == kind)[:200]:
            sequence = records.inputs[row]
            gaps.append(find(sequence, "TATA box") - find(sequence, "GC box") - width)
        assert np.mean([low <= g <= high for g in gaps]) > 0.75, kind
    first = [
        np.argmin([find(records.inputs[row], e) for e in ELEMENTS]) for row in np.flatnonzero(kinds == "order")[:200]
    ]
    assert np.bincount(first, minlength=4).min() > 10


def test_kinds_of_decoys(records):
    kinds = kinds_of(records)[records.labels == 0]
    shares = {k: (kinds == k).mean() for k in ("order", "spacing", "presence")}
    assert (
        abs(shares["order"] - 0.4) < 0.03
        and abs(shares["spacing"] - 0.4) < 0.03
        and abs(shares["presence"] - 0.2) < 0.03
    )


def test_composition_alone_cannot_solve_it(records):
    """A linear model on counts of all 4-mers stays near chance on the order and spacing decoys."""
    from sklearn.linear_model import LogisticRegression

    def counts(row):
        bases = np.searchsorted(np.frombuffer(b"ACGT", np.uint8), np.frombuffer(records.inputs[row], np.uint8))
        words = np.lib.stride_tricks.sliding_window_view(bases, 4) @ (64, 16, 4, 1)
        return np.bincount(words, minlength=256)

    train, test = (records.splits[s] for s in ("train", "test"))
    test = test[kinds_of(records)[test] != "presence"]
    model = LogisticRegression(C=0.01, max_iter=200).fit([counts(r) for r in train], records.labels[train])
    accuracy = model.score([counts(r) for r in test], records.labels[test])
    chance = max(records.labels[test].mean(), 1 - records.labels[test].mean())
    assert accuracy < chance + 0.06, accuracy


def test_through_the_datamodule():
    data = SequenceDataModule(Motifs(num_train=64, num_val=8, num_test=8))
    data.setup("fit")
    assert data.spec.class_names == ("decoy", "promoter") and data.spec.problem == "binary"
    assert data.sizes == {"train": 64, "val": 8, "test": 8} and data.preflight()["warnings"] == []


def test_options_out_of_range():
    with stops("length - length_jitter of at least 169", "got 180 - 16"):
        Motifs(length=180)
    with stops("num_train >= 4", "got 2"):
        Motifs(num_train=2)
    with stops("the motifs are simulated", "expected null"):
        Motifs().load("x", None)
