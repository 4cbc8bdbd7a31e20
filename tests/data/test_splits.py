"""Splits are partitions, stratified, seeded, and never touch a given test set."""

import numpy as np
import pytest

from bimamba.data.splits import grouped_parts, make_splits, strata_of, stratified_folds, stratified_split

OPTIONS = dict(val_fraction=0.1, test_fraction=0.2, num_folds=None, fold=None, seed=0)


def strata(n=203, seed=0):
    return np.random.default_rng(seed).choice(3, n, p=[0.6, 0.3, 0.1])


def test_split_is_a_stratified_partition():
    labels = strata()
    rest, part = stratified_split(labels, np.arange(203), 0.2, seed=1)
    assert len(part) == round(203 * 0.2)
    assert sorted([*rest, *part]) == list(range(203))
    for c in range(3):
        assert abs((labels[part] == c).sum() - 0.2 * (labels == c).sum()) < 1


def test_split_depends_on_the_seed_alone():
    labels, rows = strata(), np.arange(203)
    first = stratified_split(labels, rows, 0.2, seed=1)[1]
    assert np.array_equal(first, stratified_split(labels, rows, 0.2, seed=1)[1])
    assert not np.array_equal(first, stratified_split(labels, rows, 0.2, seed=2)[1])


def test_a_class_of_one_row_stays_in_the_rest():
    labels = np.array([0] * 9 + [1])
    rest, part = stratified_split(labels, np.arange(10), 0.5, seed=0)
    assert 9 in rest and len(part) == 5


@pytest.mark.parametrize("num_folds", [2, 5])
def test_folds_are_a_stratified_partition(num_folds):
    labels = strata(101)
    rows = np.arange(7, 101)
    folds = stratified_folds(labels, rows, num_folds, seed=3)
    assert sorted(np.concatenate(folds)) == rows.tolist()
    for c in range(3):
        counts = [(labels[f] == c).sum() for f in folds]
        assert max(counts) - min(counts) <= 1
    assert max(map(len, folds)) - min(map(len, folds)) <= 1


def grouped(sizes, n_classes=3, seed=0):
    """Rows in random order: the group of each, and its class."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return groups, rng.integers(0, n_classes, len(groups))


def test_groups_stay_whole_and_parts_near_their_shares():
    groups, labels = grouped(np.random.default_rng(1).integers(1, 12, 120))
    rows = np.arange(5, len(groups))
    rest, part = grouped_parts(labels, groups, rows, (0.8, 0.2), seed=0)
    assert np.array_equal(np.sort([*rest, *part]), rows) and not set(groups[rest]) & set(groups[part])
    for c in range(3):
        assert abs((labels[part] == c).sum() - 0.2 * (labels[rows] == c).sum()) <= 3
    # Large groups are not all in the larger part
    sizes = np.bincount(groups)
    assert abs(sizes[np.unique(groups[part])].mean() / sizes[np.unique(groups[rest])].mean() - 1) < 0.5
    again = grouped_parts(labels, groups, rows, (0.8, 0.2), seed=0)
    assert np.array_equal(again[1], part)
    assert not np.array_equal(grouped_parts(labels, groups, rows, (0.8, 0.2), seed=1)[1], part)


def test_groups_that_cannot_be_parted_evenly():
    """A group too large for the smaller part, and a class of one group, stay in the larger one."""
    groups = np.repeat([0, 1, 2, 3, 4], [60, 10, 10, 10, 10])
    rest, part = grouped_parts(np.zeros(100, int), groups, np.arange(100), (0.8, 0.2), seed=0)
    assert 0 in groups[rest] and len(part) == 20
    labels = np.array([0] * 90 + [1] * 10)
    rest, part = grouped_parts(labels, np.r_[np.arange(90) // 3, np.full(10, 30)], np.arange(100), (0.8, 0.2), seed=0)
    assert set(range(90, 100)) <= set(rest) and len(part) == 18


def test_no_rows_make_empty_parts():
    none = np.zeros(0, int)
    assert [len(part) for part in grouped_parts(none, none, none, (0.8, 0.2), seed=0)] == [0, 0]


def test_groups_of_one_row_are_split_as_rows_are():
    labels = strata()
    parts = grouped_parts(labels, np.arange(203), np.arange(203), [0.2] * 5, seed=0)
    for c in range(3):
        counts = [(labels[part] == c).sum() for part in parts]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("options", [{}, {"num_folds": 4, "fold": 1}, {"num_folds": 4, "fold": 1, "fold_role": "test"}])
def test_no_made_split_divides_a_group(options):
    groups, labels = grouped([3] * 60)
    splits, notes = make_splits({"all": np.arange(180)}, labels, groups=groups, **{**OPTIONS, **options})
    found = [set(groups[rows]) for rows in splits.values()]
    assert all(found) and sum(map(len, found)) == 60
    assert all("by whole groups" in note for note in notes)


def test_folds_by_groups_cover_every_row_once():
    groups, labels = grouped([2, 5] * 20)
    options = {**OPTIONS, "num_folds": 5, "fold_role": "test"}
    made = [make_splits({"all": np.arange(140)}, labels, groups=groups, **{**options, "fold": f})[0] for f in range(5)]
    assert np.array_equal(np.sort(np.concatenate([s["test"] for s in made])), np.arange(140))
    with pytest.raises(ValueError, match="at most one fold a group, got 5 for 3 groups"):
        make_splits({"all": np.arange(9)}, np.zeros(9, int), groups=np.arange(9) // 3, **{**options, "fold": 0})


def test_given_splits_that_divide_groups_are_said():
    given = {"train": np.arange(0, 60), "val": np.arange(60, 80), "test": np.arange(80, 100)}
    splits, notes = make_splits(given, strata(100), groups=np.arange(100) // 8, **OPTIONS)
    assert all(np.array_equal(splits[name], given[name]) for name in given)
    assert notes == ["the given splits divide 1 of 13 groups"]
    assert not make_splits(given, strata(100), groups=np.arange(100) // 20, **OPTIONS)[1]


def test_given_splits_stay_as_they_are():
    given = {"train": np.arange(0, 60), "val": np.arange(60, 80), "test": np.arange(80, 100)}
    splits, notes = make_splits(given, strata(100), **OPTIONS)
    assert all(np.array_equal(splits[name], given[name]) for name in given) and not notes


def test_missing_val_comes_from_train_never_from_test():
    given = {"train": np.arange(80), "test": np.arange(80, 100)}
    splits, notes = make_splits(given, strata(100), **OPTIONS)
    assert np.array_equal(splits["test"], given["test"])
    assert sorted([*splits["train"], *splits["val"]]) == list(range(80)) and len(splits["val"]) == 8
    assert "val" in notes[0]


def test_missing_test_comes_from_train_never_from_val():
    given = {"train": np.arange(80), "val": np.arange(80, 100)}
    splits, _ = make_splits(given, strata(100), **OPTIONS)
    assert np.array_equal(splits["val"], given["val"]) and len(splits["test"]) == 16
    assert set(splits["test"]) < set(range(80))


def test_unsplit_rows():
    splits, notes = make_splits({"all": np.arange(100)}, strata(100), **OPTIONS)
    assert [len(splits[s]) for s in ("train", "val", "test")] == [72, 8, 20]
    assert sorted(np.concatenate(list(splits.values()))) == list(range(100)) and len(notes) == 2


def test_folds_cover_everything_but_the_test_set():
    given = {"train": np.arange(60), "val": np.arange(60, 80), "test": np.arange(80, 100)}
    seen = []
    for fold in range(4):
        splits, _ = make_splits(given, strata(100), **{**OPTIONS, "num_folds": 4, "fold": fold})
        assert np.array_equal(splits["test"], given["test"])
        assert set(splits["train"]) | set(splits["val"]) == set(range(80))
        assert not set(splits["train"]) & set(splits["val"])
        seen += splits["val"].tolist()
    assert sorted(seen) == list(range(80))


def test_folds_of_unsplit_rows_share_one_test_set():
    tests = [
        make_splits({"all": np.arange(100)}, strata(100), **{**OPTIONS, "num_folds": 3, "fold": f})[0]["test"]
        for f in range(3)
    ]
    assert np.array_equal(tests[0], tests[1]) and np.array_equal(tests[0], tests[2])


def test_cross_validation_tests_every_row_once_and_validates_on_others():
    options = {**OPTIONS, "num_folds": 5, "fold_role": "test"}
    made = [make_splits({"all": np.arange(100)}, strata(100), **{**options, "fold": f})[0] for f in range(5)]
    assert np.array_equal(np.sort(np.concatenate([s["test"] for s in made])), np.arange(100))
    for splits in made:
        assert [len(splits[name]) for name in ("train", "val", "test")] == [72, 8, 20]
        assert np.array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(100))
    given = {"train": np.arange(80), "val": np.arange(80, 100)}
    splits, notes = make_splits(given, strata(100), **{**options, "fold": 0})
    assert set(splits["val"]) <= set(given["val"]) and set(splits["test"]) & set(given["val"])
    assert notes == ["test: fold 0 of 5 (stratified, seed 0)"]
    with pytest.raises(ValueError, match="without a test set"):
        make_splits({"train": np.arange(90), "test": np.arange(90, 100)}, strata(100), **{**options, "fold": 0})


def test_fractions_of_nothing_and_everything():
    none, _ = make_splits({"all": np.arange(50)}, strata(50), **{**OPTIONS, "val_fraction": 0, "test_fraction": 0})
    assert len(none["train"]) == 50
    every, _ = make_splits({"all": np.arange(50)}, strata(50), **{**OPTIONS, "test_fraction": 1})
    assert len(every["test"]) == 50 and len(every["train"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(val_fraction=1.0), r"val_fraction: expected a number in \[0, 1\), got 1.0"),
        (dict(test_fraction=-0.1), r"test_fraction: expected a number in \[0, 1\], got -0.1"),
        (dict(fold_role="train"), "fold_role: expected val or test, got 'train'"),
        (dict(num_folds=5), "go together, got num_folds=5, fold=None"),
        (dict(fold=0), "go together, got num_folds=None, fold=0"),
        (dict(num_folds=1, fold=0), "num_folds: expected at least 2, got 1"),
        (dict(num_folds=5, fold=5), r"fold: expected 0 to 4 \(num_folds=5\), got 5"),
        (dict(num_folds=5, fold=-1), r"fold: expected 0 to 4 \(num_folds=5\), got -1"),
        (dict(num_folds=90, fold=0), "at most one fold a row, got 90 for 80 rows"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make_splits({"all": np.arange(100)}, strata(100), **{**OPTIONS, **options})


def test_strata_of_multilabel_and_regression():
    labels = np.array([[0, 1]] * 30 + [[1, 0]] * 20 + [[1, 1]] * 3)
    found = strata_of(labels, "multilabel")
    assert len(set(found[:30])) == 1 and len(set(found[30:50])) == 1 and set(found[50:]) == {-1}
    tenths = strata_of(np.linspace(5, -5, 100)[:, None], "regression")
    assert np.bincount(tenths).tolist() == [10] * 10 and tenths[0] == 9
