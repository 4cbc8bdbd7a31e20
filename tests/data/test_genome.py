"""Pretraining data: an index over a FASTA file, windows without overlap, and letters hidden as BERT hides them."""

import inspect
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from bimamba.data import GenomeDataModule
from bimamba.data.fasta_index import IndexedFasta, make_index
from bimamba.data.masking import IGNORED, mask_tokens, uniform
from bimamba.data.sequences import reverse_complement
from bimamba.data.windows import Masking
from bimamba.spec import DataSpec

CONFIGS = Path(__file__).parents[2] / "configs"


def letters(n, seed=0, alphabet="ACGT"):
    return "".join(np.random.default_rng(seed).choice(list(alphabet), n))


def write(path, records, width=60, newline="\n", end=True):
    lines = [
        newline.join([f">{name} some words", *(s[i : i + width] for i in range(0, len(s), width))])
        for name, s in records.items()
    ]
    path.write_bytes((newline.join(lines) + (newline if end else "")).encode())
    return path


def module(path, **options):
    data = GenomeDataModule(path=str(path), **{"window": 50, "min_length": 10, "batch_size": 4, **options})
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture
def genome(tmp_path):
    return write(tmp_path / "g.fa", {f"chr{i}": letters(n, i) for i, n in enumerate((1030, 505, 2000, 9))})


# ----------------------------------------------------------------------------------------------------------- the index


@pytest.mark.parametrize(("newline", "end"), [("\n", True), ("\r\n", True), ("\n", False)])
def test_every_part_of_every_record_is_read(tmp_path, newline, end):
    records = {f"r{n}": letters(n, n, "ACGTNacgtn") for n in (1, 59, 60, 61, 120, 400)}
    fasta = IndexedFasta(write(tmp_path / "g.fa", records, newline=newline, end=end))
    again = pickle.loads(pickle.dumps(IndexedFasta(fasta.path)))  # from the index that is written now
    assert again.records == fasta.records and [r.name for r in fasta.records] == list(records)
    for number, text in enumerate(records.values()):
        assert fasta.records[number].length == len(text)
        for start in {0, 1, 58, 60, len(text) - 1} & set(range(len(text))):
            for stop in {start + 1, start + 60, len(text)} & set(range(start + 1, len(text) + 1)):
                assert again.read(number, start, stop).tobytes().decode() == text[start:stop]


def test_the_index_is_that_of_samtools(tmp_path):
    path = write(tmp_path / "g.fa", {"one": "A" * 130, "two": "C" * 60})
    IndexedFasta(path)
    assert (tmp_path / "g.fa.fai").read_text() == "one\t130\t16\t60\t61\ntwo\t60\t165\t60\t61\n"


def test_blocks_do_not_matter(tmp_path, monkeypatch):
    path = write(tmp_path / "g.fa", {"a": letters(1000), "b": letters(333)})
    whole = make_index(path)
    monkeypatch.setattr("bimamba.data.fasta_index.BLOCK", 100)
    assert make_index(path) == whole


def test_a_changed_file_is_indexed_anew(tmp_path):
    path = write(tmp_path / "g.fa", {"a": letters(100)})
    IndexedFasta(path)
    write(path, {"b": letters(70), "c": letters(70)})
    os.utime(tmp_path / "g.fa.fai", (0, time.time() - 100))
    assert [r.name for r in IndexedFasta(path).records] == ["b", "c"]


def test_a_folder_that_cannot_be_written_needs_no_index_file(tmp_path, monkeypatch):
    path = write(tmp_path / "g.fa", {"a": letters(100)})
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert IndexedFasta(path).records[0].length == 100
    assert os.listdir(tmp_path) == ["g.fa"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08\x00 bytes", r"compressed \(gzip or bgzip\).*gunzip --keep"),
        (b"ACGT\n", "expected '>' at the start"),
        (b"", "expected '>' at the start"),
        (b">a\nACGT\nACG\nACGT\n", "record 'a': expected lines of one length"),
        (b">a\nACGT\n\nACGT\n", "lines of one length"),
        (b">a\nACG\nACGTA\n", "lines of one length"),
        (b">a\n\nACGT\n", "lines of one length"),
        (b">a\nACGT\n>a\nACGT\n", "'a' comes twice"),
        (b">\nACGT\n", "expected a name"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "g.fa").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        IndexedFasta(tmp_path / "g.fa")
    assert not (tmp_path / "g.fa.fai").exists()


def test_bad_paths_and_indices(tmp_path):
    for path, message in ((tmp_path, "got the folder"), (tmp_path / "no.fa", "nothing is at")):
        with pytest.raises(ValueError, match=message):
            IndexedFasta(path)
    with pytest.raises(ValueError, match=r"data\.path is not set: expected a FASTA file"):
        GenomeDataModule().prepare_data()
    path = write(tmp_path / "g.fa", {"a": letters(100)})
    for text, message in (
        ("", "an empty file"),
        ("a\t100\n", "line 1: expected name, length"),
        ("a\t-1\t2\t60\t61\n", "line 1: expected name, length"),
        ("a\t100\t3\t0\t61\n", "line 1 is not of"),
        ("a\t99999\t3\t60\t61\n", "line 1 is not of .* delete g.fa.fai"),
    ):
        (tmp_path / "g.fa.fai").write_text(text)
        with pytest.raises(ValueError, match=message):
            IndexedFasta(path)


# ------------------------------------------------------------------------------------------------------ windows, splits


def test_windows_cover_the_genome_once(genome):
    data = module(genome)
    windows = data.windows
    names = [windows.name(i) for i in range(len(windows))]
    # 1030 = 20 * 50 + 30, 505 = 10 * 50 + 5 (left out), 2000 = 40 * 50, 9 < 10
    assert len(names) == 21 + 10 + 40 and names[20] == "chr0:1000-1030" and names[21] == "chr1:0-50"
    rows = np.concatenate(list(data.splits.values()))
    assert sorted(rows) == list(range(71)) and all(data.sizes.values())


def test_batches_are_pinned_where_there_is_a_gpu(genome, monkeypatch):
    assert not module(genome).train_dataloader().pin_memory
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert module(genome).train_dataloader().pin_memory


def test_splits_by_record_and_by_seed(genome):
    data = module(genome, val_records=["chr1"], test_records=["chr0"])
    assert data.sizes == {"train": 40, "val": 10, "test": 21}
    assert all(name.startswith("chr1:") for batch in data.val_dataloader() for name in batch["id"])
    first, again, other = (module(genome, seed=s).splits["val"].tolist() for s in (0, 0, 1))
    assert first == again != other
    for options, message in (
        ({"val_records": ["chrX"]}, "has no chrX; it has chr0, chr1"),
        ({"val_records": ["chr0"], "test_records": ["chr0"]}, "in common"),
        ({"window": 5000, "min_length": 4000}, "no record has"),
        ({"val_records": ["chr0", "chr1", "chr2"]}, "leave none to train on"),
    ):
        with pytest.raises(ValueError, match=message):
            module(genome, **options)


def test_a_batch_is_the_genome_with_hidden_letters(genome):
    data = module(genome, masking={"probability": 0.3})
    text = {f"chr{i}": letters(n, i) for i, n in enumerate((1030, 505, 2000))}
    seen = 0
    for batch in data.val_dataloader():
        for i, name in enumerate(batch["id"]):
            record, place = name.split(":")
            start, end = map(int, place.split("-"))
            truth = text[record][start:end]
            assert batch["mask"][i].sum() == len(truth)
            for j, letter in enumerate(truth):
                token, label = int(batch["inputs"][i, j]), int(batch["label"][i, j])
                assert label in (IGNORED, "ACGT".index(letter))
                if label == IGNORED:
                    assert "ACGTN"[token - 1] == letter
                seen += label != IGNORED
            assert (batch["inputs"][i, len(truth) :] == 0).all() and (batch["label"][i, len(truth) :] == IGNORED).all()
    assert seen > 0


def test_training_reads_both_strands(genome):
    data = module(genome, augment={"reverse_complement": 0.5}, masking={"probability": 1e-9})
    source = letters(1030, 0) + letters(505, 1) + letters(2000, 2)
    turned = 0
    batches = list(data.train_dataloader())
    for batch in batches:
        for tokens, mask in zip(batch["inputs"], batch["mask"], strict=True):
            text = "".join("ACGTN"[t - 1] for t in tokens[mask])
            other = reverse_complement(text.encode()).decode()
            assert text in source or other in source
            turned += text not in source
    assert 0.2 < turned / data.sizes["train"] < 0.8
    again = module(genome, augment={"reverse_complement": 0.5}, masking={"probability": 1e-9})
    for one, two in zip(batches, again.train_dataloader(), strict=True):
        assert one["id"] == two["id"] and torch.equal(one["inputs"], two["inputs"])


def test_masks_belong_to_the_window_not_to_the_batch(genome):
    """So several processes see what one sees, and each epoch's evaluation is of the same letters."""
    small, large = (
        {name: row for batch in module(genome, batch_size=b).val_dataloader() for name, row in _rows(batch)}
        for b in (1, 3)
    )
    assert small == large
    train = module(genome)
    loader = train.train_dataloader()
    epochs = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        epochs.append({name: row for batch in loader for name, row in _rows(batch)})
    assert epochs[0].keys() == epochs[1].keys() and epochs[0] != epochs[1]


def _rows(batch):
    for i, name in enumerate(batch["id"]):
        keep = batch["mask"][i]
        yield name, (batch["inputs"][i][keep].tolist(), batch["label"][i][keep].tolist())


def test_shares_of_hidden_letters():
    tokens = np.tile(np.array([1, 2, 3, 4, 5, 0]), (200, 100))
    read, label = mask_tokens(tokens, 4, seed=0, epoch=1, rows=np.arange(200))
    known, chosen = (tokens >= 1) & (tokens <= 4), label != IGNORED
    assert not chosen[~known].any() and (read[~chosen] == tokens[~chosen]).all()
    assert (label[chosen] == tokens[chosen] - 1).all()
    assert chosen[known].mean() == pytest.approx(0.15, abs=0.005)
    assert (read[chosen] == 5).mean() == pytest.approx(0.8, abs=0.015)
    # a random letter is the true one in a quarter of the cases
    assert ((read != 5) & (read != tokens))[chosen].mean() == pytest.approx(0.1 * 3 / 4, abs=0.01)
    assert (read == tokens)[chosen].mean() == pytest.approx(0.1 + 0.1 / 4, abs=0.01)


def test_random_numbers_are_uniform_and_independent():
    u = [uniform(3, e, np.arange(500), 100, s) for e, s in ((0, 0), (0, 1), (1, 0))]
    for values in u:
        assert values.min() >= 0 and values.max() < 1
        assert np.histogram(values, 10, (0, 1))[0] == pytest.approx(5000, rel=0.06)
        assert abs(np.corrcoef(values[:, 0], values[:, 1])[0, 1]) < 0.15
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(u[one].ravel(), u[two].ravel())[0, 1]) < 0.02


# --------------------------------------------------------------------------------------------------------- the contract


def test_preflight_and_spec(genome):
    data = module(genome)
    report = data.preflight()
    assert data.spec == DataSpec("sequence", "multiclass", tuple("ACGT"), alphabet="ACGTN", max_length=50)
    assert report["sizes"] == data.sizes and report["letters"] == 3544 and report["unknown"] == 0
    assert report["loss_of_frequencies"] == pytest.approx(np.log(4), abs=0.01)


def test_bad_letters_are_named(tmp_path):
    path = write(tmp_path / "g.fa", {"a": letters(70) + "1" + letters(129)})
    with pytest.raises(ValueError, match="a:50-100: expected letters, got '1' at position 71"):
        module(path).preflight()
    gaps = module(write(tmp_path / "n.fa", {"a": "N" * 300}))
    with pytest.raises(ValueError, match="expected some of the letters ACGT, found none"):
        gaps.preflight()


def test_another_checkpoint_is_refused(genome):
    data = GenomeDataModule(path=str(genome))
    data.expect(DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=50))
    with pytest.raises(ValueError, match="the checkpoint predicts"):
        data.setup("test")
    with pytest.raises(ValueError, match="fine-tune it first"):
        module(genome).setup("predict")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 10, "min_length": 11}, r"min_length: expected 1 to data\.window=10"),
        ({"masking": {"probability": 0}}, r"masking\.probability"),
        ({"masking": {"hidden": 0.9, "random": 0.2}}, r"hidden \+ random"),
        ({"augment": {"reverse_complement": 2}}, "reverse_complement"),
        ({"alphabet": "ACGT"}, "alphabet"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GenomeDataModule(path="g.fa", **options)


def test_the_configuration_names_every_option():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(overrides=["+data=genome", "+seed=7"])
    assert set(cfg.data) - {"_target_", "_convert_"} == set(inspect.signature(GenomeDataModule).parameters)
    assert OmegaConf.to_container(cfg.data.masking) == vars(Masking())
    assert instantiate(cfg.data).seed == 7
