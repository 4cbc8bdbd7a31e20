"""stage=explain end to end, from checkpoints of digits and DNA: files, numbers, W&B, and every bad input."""

import json
import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
from hydra.errors import ConfigCompositionException, InstantiationException
from PIL import Image
from runs import DIGITS, TINY, run, train
from wandb_files import finished, history

QUIET = ["trainer=cpu", "extras.print_config=false", "logger=none"]
FEW = ["explain.samples=2", "explain.statistics.samples=20", "explain.mutagenesis.samples=4"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    run(folder, *DIGITS, "model/mixer=bimamba2_untied", "trainer.max_epochs=1", "test=false", "logger=none")
    return f"ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"


@pytest.fixture(scope="module")
def dna(tmp_path_factory):
    """Promoters of 12 to 14 letters whose class is the letter at position 5."""
    folder = tmp_path_factory.mktemp("dna")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(120):
        letters = rng.choice(list("ACGT"), 12)
        letters[5] = "GA"[i % 2]
        rows.append(f"{''.join(letters)},{'promoter' if i % 2 else 'other'}\n")
    (folder / "rows.csv").write_text("sequence,label\n" + "".join(rows))
    options = ["experiment=sequences_csv", f"data.path={folder / 'rows.csv'}", "data.batch_size=16", "logger=none"]
    options += ["model.embedding.positions=learned", "task.optimizer.lr=0.02", "trainer.max_epochs=6"]
    run(folder / "run", *TINY, *options, "model.dropout=0", "test=false")
    return f"ckpt_path={folder / 'run' / 'checkpoints' / 'best.ckpt'}"


def drawn(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).std() > 5


def test_digits_are_explained(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ["explain.matrices.samples=2", "explain.heads=[1]", "logger=wandb"]
    metrics = run(tmp_path, "stage=explain", digits, *QUIET, *FEW, *options)
    train.finish_wandb()
    numbers = tmp_path / "numbers"
    table = pq.read_table(numbers / "scan_statistics.parquet").to_pylist()
    assert len(table) == 2 * 3 * 4  # directions, statistics, heads
    assert {r["tied"] for r in table} == {False} and table[0]["tokens"] == 20 * 4
    arrays = np.load(numbers / "scan_statistics.npz")
    median = float(np.median(arrays["0/backward/memory"]))
    assert metrics["explain/memory/layer_0_backward"] == median
    matrices = np.load(numbers / "mixing_matrices.npz")
    assert sorted(m.shape for k, m in matrices.items() if k.endswith("layer_0")) == [(1, 4, 4)] * 2
    assert metrics["explain/mixing_matrix_error"] < 1e-5
    saliency = np.load(numbers / "saliency.npz")
    assert saliency["saliency"].shape == (2, 8, 8) and np.abs(saliency["saliency"]).sum() > 0
    assert len(set(saliency["id"])) == 2
    plots = sorted(p.name for p in (tmp_path / "plots").glob("*.png"))
    assert [p.split("_digit")[0] for p in plots] == [
        "memory_by_head.png", "mixing", "mixing", "saliency.png", "scan_statistics.png"
    ]  # fmt: skip
    assert all(drawn(tmp_path / "plots" / name) for name in plots)
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    shown = history(finished(tmp_path))
    for name in ("scan_statistics", "memory_by_head", "mixing_matrices", "saliency"):
        assert shown[f"explain/{name}/_type"][0] == "images/separated", name


def test_mutagenesis_finds_the_letter_that_decides(dna, tmp_path):
    options = ["explain.mutagenesis.first_position=-5", "explain.target=promoter"]
    metrics = run(tmp_path, "stage=explain", dna, *QUIET, *FEW, *options, "explain.mutagenesis.samples=12")
    assert metrics["explain/mutated_sequences"] == 12
    table = pq.read_table(tmp_path / "numbers" / "mutagenesis.parquet").to_pandas()
    assert len(table) == 12 * 12 * 3 and not table.change.isna().any() and set(table.target) == {"promoter"}
    effect = table.change.abs().groupby(table.position).mean()
    assert effect.idxmax() == 0 and effect.min() >= 0  # letter 5, counted from -5
    means = np.load(tmp_path / "numbers" / "mutagenesis_mean.npz")
    assert means["promoter"].shape == (12, 4) and means["promoter"][5, 0] > 0 > means["other"][5, 2]
    names = {p.name.split("_rows")[0] for p in (tmp_path / "plots").glob("*.png")}
    assert {"mutagenesis", "mutagenesis_mean.png"} <= names
    assert all(drawn(p) for p in (tmp_path / "plots").glob("*.png"))


def test_a_file_of_ones_own_of_several_lengths(dna, tmp_path, caplog):
    (tmp_path / "new.csv").write_text("sequence\nACGTACGTAC\nACGNA\n")
    options = ["explain.split=predict", f"data.predict={tmp_path / 'new.csv'}", "explain.mutagenesis.window=[0,4]"]
    with caplog.at_level(logging.INFO):
        run(tmp_path / "all", "stage=explain", dna, *QUIET, *FEW, *options)
    table = pq.read_table(tmp_path / "all" / "numbers" / "mutagenesis.parquet").to_pandas()
    assert len(table) == 2 * 4 * 3 + 1  # an N can become four letters
    with caplog.at_level(logging.INFO):
        run(tmp_path / "whole", "stage=explain", dna, *QUIET, *FEW, *options[:2])
    assert "no mean logo: the sequences have different lengths" in caplog.text
    assert not (tmp_path / "whole" / "plots" / "mutagenesis_mean.png").exists()


def test_attention_has_no_step_sizes_and_says_so(tmp_path, caplog):
    tiny = [o for o in DIGITS if "d_state" not in o]  # attention has none
    run(tmp_path, *tiny, "model/mixer=attention", "trainer.max_epochs=1", "test=false", "logger=none")
    with caplog.at_level(logging.INFO):
        run(tmp_path / "e", "stage=explain", f"ckpt_path={tmp_path / 'checkpoints' / 'best.ckpt'}", *QUIET, *FEW)
    said = [r.message for r in caplog.records if r.message.startswith("explain:")]
    assert len(said) == 1 and "no scan (attention)" in said[0]
    assert [p.name for p in (tmp_path / "e" / "plots").glob("*.png")] == ["saliency.png"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("explain.split=train", "explain.split: expected one of test, val, predict, got 'train'"),
        ("explain.split=predict", "explain.split=predict needs something to explain"),
        ("explain.samples=0", "explain.samples: expected a whole number from 1, got 0"),
        ("explain.ids=[digit:0,nobody]", "explain.ids: no row .*nobody in this split; there are 359"),
        ("explain.layers=[1]", r"explain.layers: expected numbers from 0 to 0, got \[1\]"),
        ("explain.heads=[4]", r"explain.heads: expected numbers from 0 to 3, got \[4\]"),
        ("explain.target=cat", "explain.target: expected predicted, label or one of 0, .*, got 'cat'"),
        ("explain.matrices.max_length=3", "4 x 4 tokens .* at most 3"),
        ("trainer.devices=2", "expected trainer.devices=1, got 2"),
        ("explain.sampels=3", "sampels"),
    ],
)
def test_bad_inputs(digits, tmp_path, override, message):
    user_errors = (ValueError, ConfigCompositionException, InstantiationException)
    with pytest.raises(user_errors, match=message):
        run(tmp_path, "stage=explain", digits, *QUIET, *FEW, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("explain.mutagenesis.max_length=5", "at most 5 positions, got 12; choose some by explain.mutagenesis.window"),
        ("explain.mutagenesis.window=[12,20]", "starts at 12, but the longest sequence has 12"),
        ("explain.mutagenesis.window=[5,3]", "0 <= start < stop"),
    ],
)
def test_bad_mutations(dna, tmp_path, override, message):
    off = ["explain.matrices.enabled=false", "explain.statistics.enabled=false"]
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "stage=explain", dna, *QUIET, *FEW, *off, override)
