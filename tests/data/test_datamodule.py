"""The contract with train.py: the spec, what a checkpoint expects, prediction, and Lightning's hooks."""

import json
import os
import pickle
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from data_files import dna, image_table, png, sequence_rows, stops, write_fasta, write_images, write_table
from runs import QUIET

from bimamba.data import SequenceDataModule, VisionDataModule
from bimamba.data.sources import (
    Digits,
    FastaBed,
    FastaClasses,
    ImageFolder,
    ImageTable,
    MedMNIST,
    Motifs,
    SequenceTable,
)
from bimamba.spec import DataSpec

DNA = DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=50)
PHOTO = DataSpec("image", "multiclass", ("a", "b", "c"), channels=3, height=8, width=8, mean=(0.5,) * 3, std=(0.5,) * 3)


def table(path, **options):
    return SequenceDataModule(SequenceTable(), path=str(path), batch_size=8, **options)


# Splits through the DataModule


def test_splits_are_disjoint_and_depend_on_the_seed_alone(tmp_path):
    path = write_table(tmp_path / "x.csv", sequence_rows(60))

    def splits(seed):
        data = table(path, seed=seed)
        data.setup("fit")
        assert sorted(np.concatenate(list(data.splits.values()))) == list(range(60))
        return {k: v.tolist() for k, v in data.splits.items()}

    assert splits(0) == splits(0) != splits(1)


def test_without_a_seed_the_splits_can_be_repeated(tmp_path):
    path = write_table(tmp_path / "x.csv", sequence_rows(60))
    found = []
    for seed in (None, 0):
        data = table(path, seed=seed)
        data.setup("fit")
        found.append({k: v.tolist() for k, v in data.splits.items()})
        next(iter(data.train_dataloader()))
    assert found[0] == found[1]


def test_file_system_order_does_not_matter(tmp_path, monkeypatch):
    from pathlib import Path

    write_images(tmp_path / "i", {"b": 10, "a": 10})
    write_fasta(tmp_path / "f" / "b.fa", {"x": "ACGTA", "y": "AC"})
    write_fasta(tmp_path / "f" / "a.fa", {"z": "ACGT", "w": "A"})

    def ids():
        images = VisionDataModule(ImageFolder(), path=str(tmp_path / "i"))
        sequences = SequenceDataModule(FastaClasses(), path=str(tmp_path / "f"), test_fraction=0, val_fraction=0)
        images.setup("fit")
        sequences.setup("fit")
        return [next(iter(d.train_dataloader()))["id"] for d in (images, sequences)]

    first = ids()
    plain = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(plain(self))))
    turned = SimpleNamespace(scandir=lambda path: reversed(list(os.scandir(path))))
    monkeypatch.setattr("bimamba.data.files.os", turned)
    assert ids() == first


def test_folds_through_the_datamodule(tmp_path):
    write_table(tmp_path / "train.csv", sequence_rows(50))
    write_table(tmp_path / "test.csv", sequence_rows(10, seed=1))
    seen = []
    for fold in range(5):
        data = table(tmp_path, num_folds=5, fold=fold)
        data.setup("fit")
        assert data.sizes == {"train": 40, "val": 10, "test": 10}
        seen += [name for batch in data.val_dataloader() for name in batch["id"]]
    assert sorted(seen) == sorted(f"train:{i}" for i in range(1, 51))
    with stops("data.fold: expected 0 to 4 (num_folds=5), got 5"):
        table(tmp_path, num_folds=5, fold=5)


def test_spec_before_setup():
    with pytest.raises(RuntimeError, match="after setup"):
        _ = VisionDataModule(Digits()).spec
    with pytest.raises(RuntimeError, match="call setup"):
        VisionDataModule(Digits()).train_dataloader()
    with pytest.raises(RuntimeError, match="call setup"):
        VisionDataModule(Digits()).preflight()


def test_class_counts(tmp_path):
    data = table(write_table(tmp_path / "x.csv", {"sequence": ["ACGT"] * 40, "label": ["a"] * 30 + ["b"] * 10}))
    data.setup("fit")
    assert data.sizes["train"] == 29 and data.class_counts.tolist() == [22, 7]


def test_bucketing_saves_padding_and_loses_nothing():
    def padding(**options):
        data = SequenceDataModule(Motifs(num_train=640, num_val=8, num_test=8), batch_size=16, **options)
        data.setup("fit")
        batches = list(data.train_dataloader())
        assert sum(len(b["id"]) for b in batches) == len({i for b in batches for i in b["id"]}) == 640
        return sum((~b["mask"]).sum().item() for b in batches)

    assert padding(bucket=True) < 0.2 * padding()


def test_pad_to_multiple():
    data = SequenceDataModule(Motifs(num_train=64, num_val=8, num_test=8), pad_to_multiple=64)
    data.setup("fit")
    assert all(b["inputs"].shape[1] % 64 == 0 for b in data.train_dataloader())


def test_loaders_can_be_pickled_for_other_start_methods(tmp_path):
    write_images(tmp_path / "i", {"a": 5, "b": 5})
    path = write_table(tmp_path / "x.csv", sequence_rows(20))
    for data in (
        VisionDataModule(ImageFolder(), path=str(tmp_path / "i"), cache=False),
        VisionDataModule(Digits()),
        table(path),
    ):
        data.setup("fit")
        dataset = data.train_dataloader().dataset
        again = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(again[[0, 1]]["inputs"], dataset[[0, 1]]["inputs"])


# Names and order of the classes


def labels_of(data):
    return {name: b["label"].tolist()[i] for b in data.train_dataloader() for i, name in enumerate(b["id"])}


def test_the_datas_own_names_set_the_order_and_new_ones_rename(tmp_path, capsys):
    write_fasta(tmp_path / "enhancer.fa", {"e1": "ACGT", "e2": "AACC"})
    write_fasta(tmp_path / "random.fa", {"r1": "GGGT", "r2": "CCAT"})

    def data(*names):
        made = SequenceDataModule(
            FastaClasses(), path=str(tmp_path), class_names=names, val_fraction=0, test_fraction=0
        )
        made.setup("fit")
        return made

    first = {"e1": 0, "e2": 0, "r1": 1, "r2": 1}
    assert labels_of(data("enhancer", "random")) == labels_of(data("yes", "no")) == labels_of(data("yes", "random"))
    assert labels_of(data("yes", "no")) == first
    turned = data("random", "enhancer")
    assert turned.spec.class_names == ("random", "enhancer")
    assert labels_of(turned) == {name: 1 - label for name, label in first.items()}
    turned.preflight()
    assert "positive class: 'enhancer'" in capsys.readouterr().err
    with stops("data.class_names", "(enhancer, random)", "got random, other", "'random' is a name of the data"):
        data("random", "other")


def test_label_columns_in_the_order_of_the_names(tmp_path):
    path = write_table(tmp_path / "x.csv", {"sequence": ["AC", "GT"], "x": [1, 1], "y": [0, 0]})
    data = SequenceDataModule(
        SequenceTable(label_column=["x", "y"]), path=str(path), class_names=["y", "x"], val_fraction=0, test_fraction=0
    )
    data.setup("fit")
    assert data.spec.class_names == ("y", "x") and set(map(tuple, labels_of(data).values())) == {(0, 1)}
    data.predict = str(path)
    data.setup("predict")
    assert next(iter(data.predict_dataloader()))["label"].tolist() == [[0, 1]] * 2


# What a checkpoint expects


def test_evaluation_takes_everything_from_the_checkpoint(tmp_path):
    path = write_table(tmp_path / "x.csv", {"sequence": ["ACGT", "TTTT", "AC"], "label": ["yes", "yes", "no"]})
    data = table(path, test_fraction=1, alphabet="TGCAN", max_length=3)
    data.expect(DNA)
    data.setup("test")
    assert data.spec is DNA and data.sizes == {"train": 0, "val": 0, "test": 3}
    batch = next(iter(data.test_dataloader()))
    assert batch["inputs"][0].tolist() == [1, 2, 3, 4] and batch["label"].tolist() == [1, 1, 0]
    data.preflight()


def test_evaluation_of_a_part_of_the_classes(tmp_path):
    path = write_table(tmp_path / "x.csv", {"sequence": ["ACGT", "TTTT"], "label": ["yes", "yes"]})
    data = table(path, test_fraction=1)
    data.expect(DNA)
    data.setup("test")
    assert next(iter(data.test_dataloader()))["label"].tolist() == [1, 1]
    assert any("test has no rows of 'no'" in w for w in data.preflight()["warnings"])


def test_class_names_that_differ_from_the_checkpoint(tmp_path):
    rows = sequence_rows(20)
    rows["label"] = ["no", "maybe"] * 10
    data = table(write_table(tmp_path / "x.csv", rows))
    data.expect(DNA)
    with stops("class names differ", "['no', 'yes']", "['maybe', 'no']"):
        data.setup("fit")
    data = table(tmp_path / "x.csv", test_fraction=1)
    data.expect(DNA)
    with stops("x.csv: row 2", "expected a label of 'no', 'yes'", "got 'maybe'"):
        data.setup("test")
    write_fasta(tmp_path / "f" / "a.fa", {"x": "AC", "y": "GT"})
    write_fasta(tmp_path / "f" / "b.fa", {"x": "AC", "y": "GT"})
    data = SequenceDataModule(FastaClasses(), path=str(tmp_path / "f"))
    data.expect(DNA)
    with stops("class names differ", "['no', 'yes']", "['a', 'b']"):
        data.setup("test")


def test_checkpoint_of_another_kind_or_problem(tmp_path):
    path = write_table(tmp_path / "x.csv", {"sequence": ["ACGT"] * 4, "label": ["a", "b", "c", "a"]})
    data = table(path)
    data.expect(PHOTO)
    with stops("the checkpoint expects inputs of kind 'image'"):
        data.setup("fit")
    data = VisionDataModule(Digits(), class_names=["no", "yes"])
    data.expect(DNA)
    with stops("expected 10 names", "got 2"):
        data.setup("test")
    data = table(path, problem="multilabel")
    data.expect(DNA)
    with stops("data.problem", "the checkpoint expects 'binary', got 'multilabel'"):
        data.setup("test")


def test_expect_comes_first():
    data = VisionDataModule(Digits())
    data.setup("fit")
    with pytest.raises(RuntimeError, match="before setup"):
        data.expect(PHOTO)


def test_statistics_and_size_come_from_the_checkpoint(tmp_path):
    write_images(tmp_path, {"a": 5, "b": 5, "c": 5}, size=20)
    data = VisionDataModule(ImageFolder(), path=str(tmp_path), mean=[0] * 3, std=[1] * 3, image_size=20)
    data.expect(PHOTO)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert batch["inputs"].shape[1:] == (3, 8, 8)
    expected = (batch["inputs"].float() / 255 - 0.5) / 0.5
    assert torch.allclose(data.transform(batch, training=False)["inputs"], expected)


def test_round_trip_of_the_spec_gives_the_same_batches():
    first = VisionDataModule(Digits(), seed=3)
    first.setup("fit")
    second = VisionDataModule(Digits(), seed=3)
    second.expect(DataSpec.from_dict(json.loads(json.dumps(first.spec.to_dict()))))
    second.setup("test")
    for a, b in zip(first.test_dataloader(), second.test_dataloader(), strict=True):
        assert a["id"] == b["id"] and torch.equal(a["label"], b["label"])
        assert torch.equal(first.transform(a, False)["inputs"], second.transform(b, False)["inputs"])


# Prediction, without any training data


def predicted(data, spec, path):
    data.predict = str(path)
    data.expect(spec)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    ids = [name for b in batches for name in b["id"]]
    labels = [v for b in batches for v in b["label"].tolist()] if "label" in batches[0] else None
    return ids, labels


SEQUENCE_SOURCES = {
    "table": lambda: SequenceTable(sequence_column="seq", label_column="y", id_column="who"),
    "hub": lambda: SequenceTable("me/set"),
    "fasta": FastaClasses,
    "bed": lambda: FastaBed(),
    "motifs": Motifs,
}


@pytest.mark.parametrize("source", SEQUENCE_SOURCES)
def test_predict_sequences(tmp_path, source):
    def data():
        return SequenceDataModule(SEQUENCE_SOURCES[source](), path=str(tmp_path / "gone"), batch_size=2)

    fasta = write_fasta(tmp_path / "f" / "new.fa.gz", {"r1": "ACGT", "r2": "AC", "r3": "GGT"})
    assert predicted(data(), DNA, fasta) == (["r1", "r2", "r3"], None)
    if source == "table":
        path = write_table(tmp_path / "n.csv", {"seq": ["ACGT", "AC"], "who": ["x", "y"], "other": [1, 2]})
        assert predicted(data(), DNA, path) == (["x", "y"], None)
        path = write_table(tmp_path / "l.csv", {"seq": ["ACGT", "AC"], "y": ["yes", "no"]})
        assert predicted(data(), DNA, path) == (["l:1", "l:2"], [1, 0])
    else:
        path = write_table(tmp_path / "n.csv", {"sequence": ["ACGT", "AC"]})
        assert predicted(data(), DNA, path) == (["n:1", "n:2"], None)
        path = write_table(tmp_path / "l.parquet", {"seq": ["ACGT", "AC"], "label": ["yes", "no"]})
        assert predicted(data(), DNA, path)[1] == [1, 0]


def test_predict_folder_of_fasta_files_of_the_classes(tmp_path):
    write_fasta(tmp_path / "yes.fa", {"a": "ACGT"})
    write_fasta(tmp_path / "no.fa", {"b": "ACG", "c": "A"})
    data = SequenceDataModule(FastaClasses())
    assert predicted(data, DNA, tmp_path) == (["b", "c", "a"], [0, 0, 1])


def test_predict_bed(tmp_path):
    genome = write_fasta(tmp_path / "g.fa", {"chr1": dna(np.random.default_rng(0), 100)})
    (tmp_path / "x.bed").write_text("chr1\t5\t15\tyes\nchr1\t20\t40\tno\n")
    ids, labels = predicted(SequenceDataModule(FastaBed(str(genome))), DNA, tmp_path / "x.bed")
    assert ids == ["chr1:5-15(+)", "chr1:20-40(+)"] and labels == [1, 0]
    (tmp_path / "y.bed").write_text("chr1\t5\t15\n")
    assert predicted(SequenceDataModule(FastaBed(str(genome))), DNA, tmp_path / "y.bed") == (["chr1:5-15(+)"], None)


@pytest.mark.parametrize("labels", [["yes", "what"], ["yes", None], [-1, -1]])
def test_labels_that_mean_nothing_are_left_out(tmp_path, labels):
    path = write_table(tmp_path / "x.jsonl", {"sequence": ["ACGT", "AC"], "label": labels})
    with pytest.warns(UserWarning, match="left out"):
        assert predicted(SequenceDataModule(SequenceTable()), DNA, path) == (["x:1", "x:2"], None)


IMAGE_SOURCES = {
    "folder": ImageFolder,
    "table": lambda: ImageTable(image_column="img"),
    "npz": MedMNIST,
    "digits": Digits,
}


@pytest.mark.parametrize("source", IMAGE_SOURCES)
def test_predict_images(tmp_path, source):
    import pyarrow.parquet as pq

    def data():
        return VisionDataModule(IMAGE_SOURCES[source](), path=str(tmp_path / "gone"), batch_size=2)

    rng = np.random.default_rng(0)
    (tmp_path / "one").mkdir()
    for name in ("y.png", "x.png"):
        (tmp_path / "one" / name).write_bytes(png(rng, 11, 9))
    assert predicted(data(), PHOTO, tmp_path / "one" / "y.png") == (["y.png"], None)
    assert predicted(data(), PHOTO, tmp_path / "one") == (["x.png", "y.png"], None)
    write_images(tmp_path / "many", {"c": 2, "a": 1})
    assert predicted(data(), PHOTO, tmp_path / "many") == (["a/000.png", "c/000.png", "c/001.png"], [0, 2, 2])
    pq.write_table(image_table(3, "img", 3), tmp_path / "t.parquet")
    ids, labels = predicted(data(), PHOTO, tmp_path / "t.parquet")
    assert ids == ["t:1", "t:2", "t:3"] and labels == [0, 1, 2]
    images = rng.integers(0, 256, (3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "n.npz", test_images=images, test_labels=np.array([[2], [1], [0]]))
    assert predicted(data(), PHOTO, tmp_path / "n.npz") == (["n:1", "n:2", "n:3"], [2, 1, 0])
    np.savez(tmp_path / "m.npz", images)
    assert predicted(data(), PHOTO, tmp_path / "m.npz") == (["m:1", "m:2", "m:3"], None)


def test_bad_predictions(tmp_path):
    with stops("data.predict is not set"):
        VisionDataModule(Digits()).setup("predict")
    for data, spec in ((VisionDataModule(Digits()), PHOTO), (SequenceDataModule(Motifs()), DNA)):
        with stops("data.predict", "nothing is at", "gone"):
            predicted(data, spec, tmp_path / "gone")
        data._spec = None
    (tmp_path / "bad.png").write_bytes(b"none")
    with stops("bad.png", "cannot be decoded"):
        predicted(VisionDataModule(Digits()), PHOTO, tmp_path / "bad.png")
    path = write_table(tmp_path / "x.csv", {"dna": ["AC"]})
    with stops("expected the column 'sequence'", "found 'dna'"):
        predicted(SequenceDataModule(Motifs()), DNA, path)
    path = write_table(tmp_path / "long.csv", {"sequence": ["A" * 51]})
    with stops("long.csv: row 1", "max_length=50", "got 51"):
        predicted(SequenceDataModule(Motifs()), DNA, path)
    np.savez(tmp_path / "n.npz", a=np.zeros(3), b=np.zeros(3))
    with stops("expected an array named images or test_images", "found a, b"):
        predicted(VisionDataModule(Digits()), PHOTO, tmp_path / "n.npz")


def test_predict_after_fit_needs_no_checkpoint(tmp_path):
    path = write_table(tmp_path / "x.csv", {"sequence": ["ACGT", "AC"]})
    data = SequenceDataModule(Motifs(num_train=8, num_val=4, num_test=4), predict=str(path))
    data.setup("fit")
    data.setup("predict")
    assert next(iter(data.predict_dataloader()))["id"] == ["x:1", "x:2"]


# Lightning


def flat(batches):
    return [name for batch in batches for name in batch]


class Probe(lightning.LightningModule):
    """Notes what reaches each step."""

    def __init__(self, size):
        super().__init__()
        self.layer = torch.nn.Linear(size, 10)
        self.seen = {"train": [], "val": [], "test": []}

    def step(self, name, batch):
        assert batch["inputs"].dtype == torch.float32
        self.seen[name].append(batch["id"])
        return torch.nn.functional.cross_entropy(self.layer(batch["inputs"].flatten(1)), batch["label"])

    def training_step(self, batch, index):
        return self.step("train", batch)

    def validation_step(self, batch, index):
        self.step("val", batch)

    def test_step(self, batch, index):
        self.step("test", batch)

    def predict_step(self, batch, index):
        return batch["id"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**options):
    return lightning.Trainer(accelerator="cpu", **{"max_epochs": 1, "num_sanity_val_steps": 0, **QUIET, **options})


@pytest.mark.filterwarnings("ignore")
def test_fit_test_and_predict(tmp_path):
    write_images(tmp_path, {"x": 3})
    data = VisionDataModule(Digits(), batch_size=100, predict=str(tmp_path), augment={"crop_padding": 1})
    probe, run = Probe(64), trainer(max_epochs=2)
    run.fit(probe, data)
    run.test(probe, data, verbose=False)
    assert run.predict(probe, data) == [["x/000.png", "x/001.png", "x/002.png"]]
    epochs = [flat(probe.seen["train"][i : i + 13]) for i in (0, 13)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == 1294
    assert len(flat(probe.seen["val"])) == 2 * 144 and len(set(flat(probe.seen["test"]))) == 359


@pytest.mark.filterwarnings("ignore")
def test_overfitting_draws_the_same_full_batches():
    probe = Probe(64)
    trainer(max_epochs=2, overfit_batches=2).fit(probe, VisionDataModule(Digits(), batch_size=32))
    assert [len(ids) for ids in probe.seen["train"]] == [32] * 4
    assert probe.seen["train"][:2] == probe.seen["train"][2:] and len(probe.seen["val"][0]) == 32


@pytest.mark.filterwarnings("ignore")
def test_no_validation_and_no_test_set():
    probe, run = Probe(64), trainer()
    data = VisionDataModule(Digits(), batch_size=500, val_fraction=0, test_fraction=0)
    run.fit(probe, data)
    assert run.test(probe, data, verbose=False) == [] and len(set(flat(probe.seen["train"]))) == 1797


def test_processes_get_their_share(monkeypatch):
    data = VisionDataModule(Digits(), batch_size=16)
    data.setup("fit")
    parts = []
    for rank in range(3):
        monkeypatch.setattr(VisionDataModule, "_process", lambda self, rank=rank: {"rank": rank, "world_size": 3})
        parts.append([batch["id"] for batch in data.test_dataloader()])
    assert len({len(p) for p in parts}) == 1
    ids = [name for part in parts for batch in part for name in batch]
    assert len(ids) == len(set(ids)) == 359
