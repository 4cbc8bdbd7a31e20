"""Real files in ../shared/data, where this machine has them."""

from data_files import shared

from bimamba.data import SequenceDataModule, VisionDataModule
from bimamba.data.sources import FastaClasses, ImageTable, SequenceTable


def test_ecoli_sigma70():
    path = shared("promoters/ecoli_sigma70")
    data = SequenceDataModule(FastaClasses(), path=str(path), seed=0)
    data.setup("fit")
    report = data.preflight()
    assert sum(report["sizes"].values()) == 839 + 3000 and report["sizes"]["test"] == 768
    assert report["class_names"] == ["non_promoter", "promoter"] and report["lengths"]["max"] == 81
    batch = next(iter(data.train_dataloader()))
    assert batch["inputs"].shape == (64, 81) and batch["mask"].all()


def test_arabidopsis_nontata():
    path = shared("promoters/arabidopsis_nontata")
    data = SequenceDataModule(SequenceTable(sequence_column="seq"), path=str(path))
    data.setup("fit")
    report = data.preflight()
    assert report["sizes"] == {"train": 12497, "val": 1388, "test": 3472}
    assert report["unknown"]["characters"]["N"] > 0
    assert report["duplicates"]["exact"]["across"] == {"train/val": 0, "train/test": 0, "val/test": 0}
    assert sum(len(batch["id"]) for batch in data.test_dataloader()) == 3472


def test_cifar10_from_parquet():
    path = shared("cifar10")
    data = VisionDataModule(
        ImageTable(image_column="img"), path=str(path / "test.parquet"), image_size=32, channels=3, cache=False
    )
    data.setup("fit")
    assert data.sizes == {"train": 7200, "val": 800, "test": 2000}
    assert [abs(m - v) < 0.02 for m, v in zip(data.spec.mean, (0.4914, 0.4822, 0.4465), strict=True)] == [True] * 3
    batch = next(iter(data.test_dataloader()))
    assert batch["inputs"].shape == (64, 3, 32, 32) and batch["id"][0].startswith("test:")
