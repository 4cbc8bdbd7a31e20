"""Every configuration composes, instantiates, and reads a local copy in the schema of the original."""

import inspect
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import dna, image_table, sequence_rows, write_fasta, write_images, write_table
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from bimamba.data import SequenceDataModule, VisionDataModule
from bimamba.data.datamodule import ClassificationDataModule

CONFIGS = Path(__file__).parents[2] / "configs"
# A genome has no labels: tests/data/test_genome.py
NAMES = sorted(p.stem for p in (CONFIGS / "data").glob("[!_]*.yaml") if p.stem != "genome")


def config(name, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(overrides=[f"+data={name}", "+seed=7", "+paths.data_dir=/nowhere", *overrides])


def hub_images(column, classes, label="label", size=8, channels=3, splits=("train", "test")):
    def write(root):
        for i, split in enumerate(splits):
            table = image_table(4 * classes, column, classes, seed=i, size=size, channels=channels)
            table = table.rename_columns([column, label])
            if label == "fine_label":
                table = table.append_column("coarse_label", pa.array(np.arange(len(table)) % 20))
            pq.write_table(table, root / f"{split}-00000-of-00001.parquet")
        return root

    return write


def sequences(column="sequence", **more):
    def write(root):
        for i, split in enumerate(("train", "test")):
            rows = sequence_rows(40, seed=i)
            made = {column: rows["sequence"], "label": rows["label"]}
            write_table(root / f"{split}.parquet", {**made, **{k: [f(i) for i in range(40)] for k, f in more.items()}})
        return root

    return write


def npz(root):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 40), ("val", 12), ("test", 12)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 28, 28, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n)[:, None] % 4
    np.savez(root / "pathmnist.npz", **arrays)
    return root


def fasta(root):
    for name in ("a", "b"):
        rng = np.random.default_rng(ord(name))
        write_fasta(root / f"{name}.fa", {f"{i}": dna(rng, 30) for i in range(20)})
    return root


def bed(root):
    write_fasta(root / "g.fa", {"chr1": dna(np.random.default_rng(0), 400)})
    lines = [f"chr1\t{i}\t{i + 30}\t{'ab'[i % 2]}\t0\t{'+-'[i // 2 % 2]}" for i in range(60)]
    (root / "x.bed").write_text("\n".join(lines) + "\n")
    return root / "x.bed"


def folders(root):
    return write_images(root, {"a": 10, "b": 10, "c": 10})


def one_table(root):
    return write_table(root / "x.csv", sequence_rows(40))


# name: (writes a local copy and returns its path, further overrides, classes, first classes)
CASES = {
    "digits": (None, [], 10, ("0", "1")),
    "cifar10": (hub_images("img", 10), [], 10, ("airplane", "automobile")),
    "cifar100": (hub_images("img", 100, "fine_label"), [], 100, ("0", "1")),
    "mnist": (hub_images("image", 10, channels=1), [], 10, ("0", "1")),
    "fashion_mnist": (hub_images("image", 10, channels=1), [], 10, ("T-shirt / top", "Trouser")),
    "imagenet": (
        hub_images("image", 3, size=40, splits=("train", "validation", "test")),
        ["data.val_fraction=0.2", "data.image_size=16", "data.num_workers=0"],
        3,
        ("0", "1"),
    ),
    "medmnist": (npz, [], 4, ("0", "1")),
    "images_folder": (folders, ["data.image_size=16"], 3, ("a", "b")),
    "images_table": (hub_images("image", 2), [], 2, ("0", "1")),
    "motifs": (None, ["data.source.num_train=64", "data.source.num_test=16"], 2, ("decoy", "promoter")),
    "fasta_classes": (fasta, [], 2, ("a", "b")),
    "fasta_bed": (bed, ["data.source.fasta={root}/g.fa"], 2, ("a", "b")),
    "table": (one_table, [], 2, ("0", "1")),
    "genomic_benchmark": (sequences("seq"), [], 2, ("0", "1")),
    "nucleotide_transformer": (
        sequences(name=lambda i: f"r{i}", task=lambda i: ["promoter_all", "other"][i // 2 % 2]),
        [],
        2,
        ("0", "1"),
    ),
}


def test_every_configuration_is_tried():
    assert sorted(CASES) == NAMES


@pytest.mark.parametrize("name", CASES)
def test_configuration_reads_a_local_copy(tmp_path, name):
    write, overrides, classes, first = CASES[name]
    if write is not None:
        overrides = [f"data.path={write(tmp_path)}", *overrides]
    cfg = config(name, *(o.format(root=tmp_path) for o in overrides), "data.batch_size=8")
    data = instantiate(cfg.data)
    assert data.seed == 7
    data.prepare_data()
    data.setup("fit")
    report = data.preflight()
    assert len(data.spec.class_names) == classes and data.spec.class_names[:2] == first
    assert all(report["sizes"].values())
    for loader, training in ((data.train_dataloader(), True), (data.val_dataloader(), False)):
        batch = data.transform(next(iter(loader)), training)
        assert str(batch["inputs"].dtype) == ("torch.int64" if "mask" in batch else "torch.float32")
        assert len(batch["id"]) == len(batch["label"]) == len(batch["inputs"]) <= 8


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_spelt_out(name):
    """Nobody needs `+`: configurations name every argument of the constructors they instantiate, and no other."""
    cfg = OmegaConf.to_container(config(name).data, resolve=False)
    kind = {"VisionDataModule": VisionDataModule, "SequenceDataModule": SequenceDataModule}[
        cfg["_target_"].split(".")[-1]
    ]
    expected = set()
    for cls in (kind, ClassificationDataModule):
        expected |= set(inspect.signature(cls.__init__).parameters)
    assert set(cfg) == expected - {"self", "options"} | {"_target_", "_convert_"}
    from bimamba.data import sources
    from bimamba.data.augment import ImageAugmentation

    source = getattr(sources, cfg["source"].pop("_target_").split(".")[-1])
    assert set(cfg["source"]) == set(inspect.signature(source).parameters)
    if kind is VisionDataModule:
        assert set(cfg["augment"]) == set(inspect.signature(ImageAugmentation).parameters)
    else:
        assert set(cfg["augment"]) == {"reverse_complement", "shift", "substitution"}


def test_imagenet_evaluates_on_its_validation_set(tmp_path):
    hub_images("image", 3, size=40, splits=("train", "validation", "test"))(tmp_path)
    data = instantiate(config("imagenet", f"data.path={tmp_path}", "data.val_fraction=0.25").data)
    data.setup("fit")
    assert data.sizes == {"train": 9, "val": 3, "test": 12}
    assert all(name.startswith("validation-") for batch in data.test_dataloader() for name in batch["id"])


def test_importing_the_data_room_is_light():
    import subprocess
    import sys

    heavy = ("datasets", "kornia", "sklearn", "pandas", "torchvision")
    code = f"import sys, bimamba.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
