"""A checkpoint knows the rows that it was trained on, and says so where they would be tested."""

import warnings

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pytest
from hydra.utils import instantiate
from runs import composed

from bimamba import config
from bimamba.data import fingerprint as module
from bimamba.data.fingerprint import compare, fingerprint


def table(path, n=40, seed=0):
    rng = np.random.default_rng(seed)
    rows = {"sequence": ["".join(rng.choice(list("ACGT"), 20)) for _ in range(n)], "label": [i % 2 for i in range(n)]}
    csv.write_csv(pa.table(rows), path)
    return path


def read(path, *options):
    cfg = composed(path.parent, "experiment=sequences_csv", f"data.path={path}", *options)
    data = instantiate(cfg.data)
    data.setup("fit")
    return data.fingerprint, config.resolved(cfg)["data"]


def said(then, now, use="evaluated"):
    checkpoint = {"splits": then[0], "config": {"data": then[1]}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compare(checkpoint, *now, use)
    return " ".join(str(w.message) for w in caught)


@pytest.fixture
def rows(tmp_path):
    return table(tmp_path / "rows.csv")


def test_other_rows_of_the_same_data_are_told(rows, tmp_path, monkeypatch):
    then = read(rows)
    assert then[0]["rows"] == 29 and not said(then, read(rows))
    found = said(then, read(rows, "data.seed=5"))
    assert "may be among those tested (data.seed=5; the old rows come with data.seed=0)" in found
    assert "29 training rows" in found and "may be trained on" in said(then, read(rows, "data.seed=5"), "resumed")
    assert "data.test_fraction=0.5; " in said(then, read(rows, "data.test_fraction=0.5"))
    monkeypatch.chdir(tmp_path)
    relative = read(rows, "data.val_fraction=0.3")
    relative[1]["path"] = "rows.csv"
    assert "data.val_fraction=0.3" in said(then, relative)
    assert not said(then, read(table(tmp_path / "other.csv", seed=1), "data.test_fraction=0.5"))  # other data
    table(rows, seed=2)
    assert "have changed since" in said(then, read(rows))
    assert not said(({}, then[1]), read(rows))  # a checkpoint of an earlier version


def test_names_and_a_sample_of_the_rows_count(monkeypatch):
    rows, asked = np.arange(10_000), []
    first = fingerprint(rows, b"names", lambda row: asked.append(row) or b"x")
    assert len(asked) == module.SAMPLED and asked[-1] == 9999
    assert fingerprint(rows, b"other names", lambda row: b"x") != first != fingerprint(rows, b"names", lambda row: b"y")
    assert fingerprint(rows[:0], b"", lambda row: b"x")["rows"] == 0
