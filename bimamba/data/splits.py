"""Seeded, stratified splits. The result depends on the seed and on the rows alone, never on a file system's order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bimamba.data.records import UNSPLIT


def stratified_split(strata: np.ndarray, rows: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Takes a part of `rows`, as evenly over the strata as whole numbers allow.

    Args:
        strata: int64 `(n,)`: the stratum (class) of every row of the data set.
        rows: int64 `(m,)`: the rows to split.
        fraction: size of the part, in [0, 1).
        seed: decides which rows.

    Returns:
        `(rest, part)`, both sorted; `part` has `round(m * fraction)` rows (fewer where strata of one row, which stay in
        the rest, leave no choice).
    """
    rng = np.random.default_rng(seed)
    groups = [rng.permutation(rows[strata[rows] == s]) for s in np.unique(strata[rows])]
    sizes = np.array([len(g) for g in groups])
    wanted = round(len(rows) * fraction)
    exact = sizes * fraction
    take = np.minimum(np.floor(exact).astype(int), sizes - 1)
    # What rounding down left over goes to the largest remainders; ties go to the first stratum.
    order = np.argsort(-(exact - take), kind="stable")
    while (missing := wanted - take.sum()) > 0:
        room = [i for i in order if take[i] < sizes[i] - 1][:missing]
        if not room:
            break
        take[room] += 1
    part = np.concatenate([g[:k] for g, k in zip(groups, take, strict=True)])
    rest = np.concatenate([g[k:] for g, k in zip(groups, take, strict=True)])
    return np.sort(rest), np.sort(part)


def stratified_folds(strata: np.ndarray, rows: np.ndarray, num_folds: int, seed: int) -> list[np.ndarray]:
    """Partition of `rows` into folds whose sizes, and whose class counts, differ by at most one."""
    rng = np.random.default_rng(seed)
    dealt = np.concatenate([rng.permutation(rows[strata[rows] == s]) for s in np.unique(strata[rows])])
    return [np.sort(dealt[fold::num_folds]) for fold in range(num_folds)]


def grouped_parts(
    strata: np.ndarray, groups: np.ndarray, rows: np.ndarray, shares: Sequence[float], seed: int
) -> list[np.ndarray]:
    """Partition of `rows` into parts of the given shares that divides no group.

    Groups are dealt out one by one, the largest first (those of one size in the seed's order), each to the part whose
    counts of every stratum it brings closest to that part's share, by chi-square.

    Args:
        strata, groups: int64 `(n,)`: the stratum and the group of every row of the data set.
        rows: int64 `(m,)`: the rows to part.
        shares: of the parts, each above 0, 1 in all; where it makes no difference the first part takes the group.
        seed: decides the order.
    """
    _, kind = np.unique(strata[rows], return_inverse=True)
    _, of, sizes = np.unique(groups[rows], return_inverse=True, return_counts=True)
    members = np.split(np.argsort(of, kind="stable"), np.cumsum(sizes)[:-1])
    totals = np.bincount(kind)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    share = np.asarray(shares)
    missing = share[:, None] * totals  # (parts, strata)
    part_of = np.empty(len(rows), np.int64)
    for group in order:
        counts = np.bincount(kind[members[group]], minlength=len(totals))
        # By how much the sum of (missing rows)^2 / expected rows falls
        part = int(np.argmax((2 * missing - counts) @ (counts / totals) / share))
        missing[part] -= counts
        part_of[members[group]] = part
    return [np.sort(rows[part_of == part]) for part in range(len(share))]


def strata_of(labels: np.ndarray, problem: str) -> np.ndarray:
    """Stratum of every row.

    Classes for multiclass and binary; combinations of labels for multilabel (those of fewer than ten rows together);
    tenths of the first target's range, by rank, for regression.
    """
    if problem in ("multiclass", "binary"):
        return labels.astype(np.int64)
    if problem == "multilabel":
        _, strata, counts = np.unique(labels, axis=0, return_inverse=True, return_counts=True)
        strata = strata.reshape(-1)  # some numpy releases keep the axes of `labels`
        return np.where(counts[strata] < 10, -1, strata)
    ranks = np.argsort(np.argsort(labels[:, 0], kind="stable"), kind="stable")
    return ranks * 10 // max(len(ranks), 1)


def make_splits(
    given: dict[str, np.ndarray],
    strata: np.ndarray,
    *,
    val_fraction: float,
    test_fraction: float,
    num_folds: int | None,
    fold: int | None,
    seed: int,
    fold_role: str = "val",
    groups: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The three splits, those the source does not define made from its training rows.

    Args:
        given: rows of `train`, `val`, `test` as the source defines them, or of `all`.
        strata: as in `stratified_split`.
        val_fraction: part of the non-test rows that becomes the validation set, where none is given.
        test_fraction: part of all rows (or of the training rows, where validation but no test set is given) that
            becomes the test set, where none is given; 0: no test set; 1: every row is a test row.
        num_folds, fold: k-fold over the non-test rows; fold number `fold` is the validation set.
        seed: decides which rows.
        fold_role: `val`, or `test`: cross-validation. The folds are of all rows, fold number `fold` is the test set
            and the validation set comes out of the others, so that nothing is chosen on rows that are tested.
        groups: int64 `(n,)`: rows of one group come into one split, where splits are made; None: each row may go
            anywhere.

    Returns:
        The splits, and sentences that say what was done.

    Raises:
        ValueError: an option is out of range, cross-validation of data that have a test set of their own, or fewer
            groups than folds.
    """

    def divide(rows: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        if groups is None or not fraction:
            return stratified_split(strata, rows, fraction, seed)
        rest, part = grouped_parts(strata, groups, rows, (1 - fraction, fraction), seed)
        return rest, part

    def deal(rows: np.ndarray) -> np.ndarray:
        assert num_folds is not None and fold is not None
        if groups is None:
            return stratified_folds(strata, rows, num_folds, seed)[fold]
        if (found := len(np.unique(groups[rows]))) < num_folds:
            raise ValueError(f"data.num_folds: expected at most one fold a group, got {num_folds} for {found} groups")
        return grouped_parts(strata, groups, rows, [1 / num_folds] * num_folds, seed)[fold]

    check_fractions(val_fraction, test_fraction, num_folds, fold, fold_role)
    splits = {name: given.get(name, np.zeros(0, np.int64)) for name in ("train", "val", "test")}
    if UNSPLIT in given:
        splits["train"] = given[UNSPLIT]
    how = "stratified" if groups is None else "stratified, by whole groups"
    notes = [] if groups is None else _divided(splits, groups)
    testing = num_folds is not None and fold_role == "test"
    if testing and "test" in given:
        raise ValueError("data.fold_role=test: expected data without a test set, these have one; use fold_role=val")
    if testing:
        assert num_folds is not None
        splits["test"] = deal(_pool(splits, num_folds))
        for name in ("train", "val"):
            splits[name] = np.setdiff1d(splits[name], splits["test"], assume_unique=True)
        notes.append(f"test: fold {fold} of {num_folds} ({how}, seed {seed})")
    elif "test" not in given:
        if test_fraction == 1:
            splits = {"train": splits["val"][:0], "val": splits["val"][:0], "test": _merge(splits)}
            return splits, ["every row is a test row (test_fraction=1)"]
        splits["train"], splits["test"] = divide(splits["train"], test_fraction, seed)
        notes.append(f"test: {test_fraction:.0%} of the rows, {how}, seed {seed} (no test set given)")
    if num_folds is not None and not testing:
        pool = _pool(splits, num_folds)
        splits["val"] = deal(pool)
        splits["train"] = np.setdiff1d(pool, splits["val"], assume_unique=True)
        notes.append(f"val: fold {fold} of {num_folds} ({how}, seed {seed}) of the non-test rows")
    elif "val" not in given and len(splits["train"]):
        splits["train"], splits["val"] = divide(splits["train"], val_fraction, seed + 1)
        notes.append(f"val: {val_fraction:.0%} of the training rows, {how}, seed {seed} (no validation set given)")
    return splits, notes


def _divided(splits: dict[str, np.ndarray], groups: np.ndarray) -> list[str]:
    """A sentence where the source's own splits divide groups."""
    every = np.unique(groups)
    several = int((np.sum([np.isin(every, groups[rows]) for rows in splits.values()], axis=0) > 1).sum())
    return [f"the given splits divide {several} of {len(every)} groups"] if several else []


def check_parts(
    given: dict[str, np.ndarray], splits: dict[str, np.ndarray], val_fraction: float, test_fraction: float
) -> None:
    """Raises ValueError for a part of the training rows that was asked for and has no row."""
    for name, fraction in (("val", val_fraction), ("test", test_fraction)):
        if fraction and name not in given and not len(splits[name]):
            raise ValueError(
                f"data.{name}_fraction: expected at least one row in a part of {fraction:g}, got none "
                f"(of {len(splits['train'])} training rows every class keeps one, and groups stay whole); "
                "give more rows, or set it to 0"
            )


def _pool(splits: dict[str, np.ndarray], num_folds: int) -> np.ndarray:
    pool = np.sort(np.concatenate([splits["train"], splits["val"]]))
    if len(pool) < num_folds and len(pool):
        raise ValueError(f"data.num_folds: expected at most one fold a row, got {num_folds} for {len(pool)} rows")
    return pool


def check_fractions(
    val_fraction: float, test_fraction: float, num_folds: int | None, fold: int | None, fold_role: str = "val"
) -> None:
    """Raises ValueError for options that no data set could satisfy."""
    if fold_role not in ("val", "test"):
        raise ValueError(f"data.fold_role: expected val or test, got {fold_role!r}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"data.val_fraction: expected a number in [0, 1), got {val_fraction}")
    if not 0 <= test_fraction <= 1:
        raise ValueError(f"data.test_fraction: expected a number in [0, 1], got {test_fraction}")
    if (num_folds is None) != (fold is None):
        raise ValueError(f"data.num_folds and data.fold go together, got num_folds={num_folds}, fold={fold}")
    if num_folds is not None and num_folds < 2:
        raise ValueError(f"data.num_folds: expected at least 2, got {num_folds}")
    if num_folds is not None and fold is not None and not 0 <= fold < num_folds:
        raise ValueError(f"data.fold: expected 0 to {num_folds - 1} (num_folds={num_folds}), got {fold}")


def _merge(splits: dict[str, np.ndarray]) -> np.ndarray:
    return np.sort(np.concatenate(list(splits.values())))
