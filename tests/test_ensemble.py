"""bimamba.ensemble: means of predictions, whose metrics are a test's own; folds; every bad input."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import DIGITS, run

from bimamba.ensemble import main
from bimamba.predictions import FILE, Predictions, read_predictions, write_predictions


def predictions(problem="binary", classes=2, ids="abcdef", seed=0, labels=True):
    rng = np.random.default_rng(seed)
    rows, names = len(ids), tuple(["no", "yes", "maybe"][:classes])
    values = rng.random((rows, classes)).astype("f4")
    if problem == "binary":
        values = values[:, 0]
    elif problem == "multiclass":
        values /= values.sum(1, keepdims=True)
    truth = {
        "binary": np.arange(rows) % 2,
        "multiclass": np.arange(rows) % classes,
        "multilabel": (np.arange(rows)[:, None] + np.arange(classes)) % 2,
        "regression": np.arange(rows * classes, dtype="f4").reshape(rows, classes),
    }[problem]
    return Predictions(problem, names, list(ids), values, truth if labels else None)


def write(folder, found):
    write_predictions(folder / FILE, found.table())
    return folder


def backwards(found):
    return found.in_order(found.ids[::-1])


@pytest.mark.parametrize(
    ("problem", "classes"), [("binary", 2), ("multiclass", 3), ("multilabel", 3), ("regression", 1), ("regression", 2)]
)
@pytest.mark.parametrize("labels", [True, False])
def test_a_table_is_read_as_it_was_written_and_averaged(tmp_path, problem, classes, labels):
    parts = [predictions(problem, classes, seed=s, labels=labels) for s in range(3)]
    for seed, part in enumerate(parts):
        write(tmp_path / "runs" / str(seed), part)
    again = read_predictions(tmp_path / "runs" / "0" / FILE)
    np.testing.assert_array_equal(again.probabilities, parts[0].probabilities)
    np.testing.assert_equal(again.labels, parts[0].labels)
    assert (again.problem, again.class_names, again.ids) == (problem, parts[0].class_names, list("abcdef"))
    (found,) = main([str(tmp_path / "runs")])
    assert len(found.files) == 3
    joint = read_predictions(tmp_path / "runs" / "ensemble" / FILE)
    np.testing.assert_allclose(joint.probabilities, np.mean([p.probabilities for p in parts], 0), rtol=1e-6)
    assert (tmp_path / "runs" / "ensemble" / "metrics.json").exists() == labels


@pytest.mark.parametrize("labels", [True, False])
def test_one_target_without_a_name_is_the_prediction(tmp_path, labels):
    found = predictions("regression", 1, labels=labels)._replace(class_names=("0",))
    table = found.table()
    assert table.column_names == ["id", "prediction", *(["label"] if labels else [])]
    earlier = table.rename_columns(["id", "prediction_0", *(["label_0"] if labels else [])])  # as they were called
    earlier = earlier.replace_schema_metadata(table.schema.metadata)
    for name, written in (("new", table), ("old", earlier)):
        write_predictions(tmp_path / name / FILE, written)
        again = read_predictions(tmp_path / name / FILE)
        assert again.class_names == ("0",)
        np.testing.assert_array_equal(again.probabilities, found.probabilities)
        np.testing.assert_equal(again.labels, found.labels)


def test_one_network_twice_has_the_metrics_of_its_test(tmp_path):
    tested = run(tmp_path / "a", *DIGITS, "trainer.max_epochs=1", "logger=none", "callbacks.learning_curves=null")
    again = write(tmp_path / "b", read_predictions(tmp_path / "a" / FILE))
    (found,) = main([str(tmp_path / "a"), str(again)])
    for metrics in (*found.single, found.joint, json.loads((tmp_path / "a/ensemble/metrics.json").read_text())):
        assert metrics == {name: pytest.approx(tested[name], abs=1e-6) for name in metrics}
    assert {"test/accuracy", "test/mcc", "test/auroc"} <= set(found.joint)


def test_which_tables_count(tmp_path, capsys):
    for seed in range(2):
        write(tmp_path / "runs" / str(seed), predictions(seed=seed))
    write(tmp_path / "elsewhere", backwards(predictions(seed=2)))
    (tmp_path / "runs" / "2").symlink_to(tmp_path / "elsewhere")  # a run on another disk
    (tmp_path / "runs" / "round").symlink_to(tmp_path / "runs")
    write(tmp_path / "runs" / "0" / "test" / "now", predictions(seed=9))  # an evaluation beneath a run is no run
    expected = np.mean([predictions(seed=s).probabilities for s in range(3)], 0)
    # an ensemble lies beneath the folder already, or in it
    for out in ("one", "two", ".", "."):
        (found,) = main([str(tmp_path / "runs"), "--out", str(tmp_path / "runs" / out)])
        assert len(found.files) == 3
        np.testing.assert_allclose(found.mean.probabilities, expected, rtol=1e-6)
    assert f"note: left out, an ensemble itself: {tmp_path / 'runs' / 'one' / FILE}" in capsys.readouterr().out
    write(tmp_path / "runs" / "0", predictions(labels=False))
    write(tmp_path / "runs" / "1", predictions(labels=False))
    main([str(tmp_path / "runs" / name) for name in "01"] + ["--out", str(tmp_path / "runs" / "one")])
    assert [f.name for f in (tmp_path / "runs" / "one").iterdir()] == [FILE]  # no metrics of the labelled ones


def test_folds_are_ensembles_of_their_own(tmp_path, capsys):
    for fold, ids in enumerate(("abcdef", "ghijkl")):
        for seed in range(2):
            write(tmp_path / f"{fold}_{seed}", predictions(ids=ids, seed=seed + 5 * fold))
    found = main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert [len(e.files) for e in found] == [2, 2]
    assert read_predictions(tmp_path / "out" / FILE).ids == list("abcdefghijkl")
    accuracy = [e.joint["test/accuracy"] for e in found]
    text = (tmp_path / "out" / "table.md").read_text()
    assert text in capsys.readouterr().out and "| one run (n = 4) | mean of 2 runs (n = 2) |" in text
    assert f"| {np.mean(accuracy):.4f} ± {np.std(accuracy, ddof=1):.4f} |" in text
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["test/accuracy"] == pytest.approx(
        np.mean(accuracy)
    )


def test_bad_input(tmp_path):
    def error(*folders):
        with pytest.raises(SystemExit) as caught:
            main([str(f) for f in folders])
        return str(caught.value)

    a, b = write(tmp_path / "a", predictions()), write(tmp_path / "b", predictions(seed=1))
    assert "no such folder" in error(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no predictions.parquet in it or beneath it" in error(tmp_path / "empty")
    assert "no other run has predictions of its rows" in error(a)
    assert "no other run has predictions of its rows" in error(a, a)
    c = write(tmp_path / "c", predictions(ids="bcdefg"))
    for runs in ((a, c), (a, b, c)):
        assert "have 5 rows in common, e.g. 'b', but not all" in error(*runs)
    write(c, predictions(ids="abcdee"))
    assert "several rows are called 'e'" in error(a, c)
    broken = predictions()
    broken.probabilities[1] = np.nan
    write(c, broken)
    assert "expected numbers as predictions, got NaN" in error(a, c)
    write(c, predictions(ids=""))
    assert "got a table without rows" in error(a, c)
    write(c, predictions()._replace(members=3))
    assert "which is the mean of several already" in error(c)
    assert "expected a new folder, or an earlier ensemble's" in error(a, b, "--out", a)
    (tmp_path / "empty" / "metrics.json").write_text("{}")
    assert "which holds metrics.json" in error(a, b, "--out", tmp_path / "empty")
    other = predictions()
    write(c, other._replace(labels=1 - other.labels))
    assert "give the same rows different labels" in error(a, c)
    write(c, predictions(labels=False))
    assert "give the same rows different labels" in error(a, c)
    write(c, other._replace(class_names=("no", "maybe")))
    assert "class_names: " in error(a, c) and "('no', 'maybe')" in error(a, c)
    write(c, predictions(ids="uvwxyz", labels=False))
    write(tmp_path / "d", predictions(ids="uvwxyz", labels=False, seed=1))
    assert "labels everywhere or nowhere" in error(a, b, c, tmp_path / "d")
    pq.write_table(pa.table({"id": ["x"]}), c / FILE)
    assert "its metadata have no 'bimamba.problem'" in error(a, c)
    (c / FILE).write_bytes(b"PAR1 and no more")
    assert "expected a table of predictions as Parquet" in error(a, c)
