"""The preflight says what is in the data, and stops what cannot work."""

import json

import numpy as np
from data_files import png, sequence_rows, stops, write_images, write_table

from bimamba.data import SequenceDataModule, VisionDataModule
from bimamba.data.sequences import reverse_complement
from bimamba.data.sources import ImageFolder, SequenceTable


def report(path, source=None, **options):
    data = SequenceDataModule(source or SequenceTable(), path=str(path), **options)
    data.setup("fit")
    return data.preflight()


def splits(tmp_path, train, val, test):
    for name, (sequences, labels) in (("train", train), ("val", val), ("test", test)):
        write_table(tmp_path / f"{name}.csv", {"sequence": sequences, "label": labels})
    return tmp_path


def test_report_is_plain_and_complete(tmp_path, capsys):
    found = report(write_table(tmp_path / "x.csv", sequence_rows(100)))
    assert json.loads(json.dumps(found)) == found
    assert found["sizes"] == {"train": 72, "val": 8, "test": 20}
    assert found["class_counts"]["train"] == {"0": 36, "1": 36}
    assert found["unknown"] == {"characters": {}, "share": 0.0, "become": "N"}
    assert len(found["notes"]) == 2 and found["warnings"] == []
    printed = capsys.readouterr().err
    for part in ("rows", "train", "72", "lengths: 20 to 40", "duplicates: none", "no test set given"):
        assert part in printed, part


def test_length_histogram_counts_every_row(tmp_path):
    columns = {"sequence": ["A" * n + "CGT" for n in (1, 1, 5, 9, 30, 60, 60, 99)] * 4, "label": [0, 1] * 16}
    lengths = report(write_table(tmp_path / "x.csv", columns))["lengths"]
    assert (lengths["min"], lengths["max"]) == (4, 102)
    assert sum(map(sum, lengths["histogram"].values())) == 32
    assert len(lengths["edges"]) == len(lengths["histogram"]["train"]) + 1


def test_unknown_characters_are_counted(tmp_path):
    found = report(
        write_table(tmp_path / "x.csv", {"sequence": ["ACNN", "ACGR", "acgt", "TTTT"], "label": [0, 1] * 2}),
        val_fraction=0,
    )
    assert found["unknown"]["characters"] == {"N": 2, "R": 1} and found["unknown"]["share"] == 3 / 16


def test_text_that_is_no_dna_stops(tmp_path):
    columns = {"sequence": ["WELLTHISISPROSE", "SOMEMORE"], "label": [0, 1]}
    with stops("are unknown to the alphabet 'ACGTN'", "the right column", "data.alphabet"):
        report(write_table(tmp_path / "x.csv", columns), test_fraction=0, val_fraction=0)


def test_duplicates_within_across_and_on_the_other_strand(tmp_path):
    a, b, c, d, e, f = sequence_rows(6, seed=4)["sequence"]
    turned = reverse_complement(b.encode()).decode()
    path = splits(tmp_path, ([a, b, c, a], [0, 1, 0, 0]), ([d, c], [0, 1]), ([e, f, turned, a.lower()], [0, 1, 1, 0]))
    found = report(path)
    assert found["duplicates"]["exact"] == {
        "within": {"train": 1, "val": 0, "test": 0},
        "across": {"train/val": 1, "train/test": 1, "val/test": 0},
    }
    assert found["duplicates"]["either_strand"] == {
        "within": {"train": 1, "val": 0, "test": 0},
        "across": {"train/val": 1, "train/test": 2, "val/test": 0},
    }
    assert found["duplicates"]["conflicting_labels"] == 2
    said = " ".join(found["warnings"])
    assert "2 rows of test are also in train (reverse complements included)" in said
    assert "2 rows have a duplicate with another label" in said
    assert report(path, check_duplicates=False)["duplicates"] is None


def test_other_alphabets_have_no_other_strand(tmp_path):
    path = splits(tmp_path, (["KM", "MK"], [0, 1]), (["KK"], [0]), (["MM"], [1]))
    found = report(path, alphabet="KMX")
    assert set(found["duplicates"]) == {"exact", "conflicting_labels"}


def test_imbalance_is_a_warning(tmp_path):
    columns = sequence_rows(100)
    columns["label"] = ["rare"] * 8 + ["common"] * 92
    said = report(write_table(tmp_path / "x.csv", columns))["warnings"]
    assert len(said) == 1 and "67 training rows of 'common', 5 of 'rare'" in said[0]


def test_a_split_without_a_class_is_a_warning(tmp_path):
    rows = sequence_rows(5, seed=3)["sequence"]
    said = report(splits(tmp_path, (rows[:2], [0, 1]), (rows[2:3], [0]), (rows[3:], [0, 1])))["warnings"]
    assert said == ["val has no rows of '1'"]


def test_multilabel_and_regression(tmp_path):
    columns = {
        "sequence": sequence_rows(50)["sequence"],
        "x": [0, 1] * 25,
        "y": [0] * 50,
        "z": [i / 4 for i in range(50)],
    }
    path = write_table(tmp_path / "x.csv", columns)
    found = report(path, SequenceTable(label_column=["x", "y"]))
    assert found["class_counts"]["train"]["x"] == 18 and "no training row carries the label 'y'" in found["warnings"]
    found = report(path, SequenceTable(label_column="z"), problem="regression", class_names=["strength"])
    assert found["targets"]["strength"]["train"]["max"] <= 12.25 and "class_counts" not in found
    assert json.loads(json.dumps(found)) == found
    with stops("target 'still': expected values that differ, got 0 in every row"):
        report(path, SequenceTable(label_column="y"), problem="regression", class_names=["still"])


def test_images(tmp_path, capsys):
    write_images(tmp_path, {"a": 10, "b": 10})
    same = png(np.random.default_rng(9))
    for name in ("a/x.png", "b/y.png", "b/z.png"):
        (tmp_path / name).write_bytes(same)
    data = VisionDataModule(ImageFolder(), path=str(tmp_path))
    data.setup("fit")
    found = data.preflight()
    counts = found["duplicates"]["exact"]
    assert sum(counts["within"].values()) + sum(counts["across"].values()) in (2, 3)
    assert found["duplicates"]["conflicting_labels"] == 3
    assert found["image"]["in_memory"] and found["image"]["channels"] == 3 and len(found["image"]["mean"]) == 3
    assert "3×8×8" in capsys.readouterr().err
    data = VisionDataModule(ImageFolder(), path=str(tmp_path), cache=False)
    data.setup("fit")
    assert data.preflight()["duplicates"] is None and "not looked for" in capsys.readouterr().err


def test_many_classes_are_summarised(tmp_path, capsys):
    found = report(write_table(tmp_path / "x.csv", sequence_rows(200, classes=20)))
    assert len(found["class_counts"]["train"]) == 20
    printed = capsys.readouterr().err
    assert "smallest class" in printed and "largest class" in printed


def test_only_rank_zero_prints(tmp_path, capsys, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    path = write_table(tmp_path / "x.csv", sequence_rows(20))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert report(path)["sizes"]["train"] == 14 and capsys.readouterr().err == ""
