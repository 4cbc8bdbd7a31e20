"""data.packing through the Trainer: two processes (DDP) give what one gives with padding; bf16 what float32 gives."""

import json

import numpy as np
import pytest
import torch
from processes import two_processes
from runs import TINY, load, run, train

OPTIONS = ["experiment=promoters", *TINY, "trainer.max_epochs=1", "data.batch_size=8", "data.check_duplicates=false"]
OPTIONS += ["callbacks.learning_curves=null", "callbacks.examples=null", "callbacks.throughput=null", "logger=none"]
OPTIONS += ["trainer.num_sanity_val_steps=0", "model.dropout=0", "model.head_dropout=0", "model.drop_path=0"]
# 48 rows of training: six whole batches of 8, or of twice 4
OPTIONS += ["data.augment.substitution=0", "data.test_fraction=0.2", "data.val_fraction=0.25"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed_training")
    rng = np.random.default_rng(0)
    for name, letters in (("rich", "ACGGCC"), ("poor", "ACGTTAAT")):
        rows = ["".join(rng.choice(list(letters), rng.integers(5, 50))) for _ in range(40)]
        (folder / f"{name}.fa").write_text("".join(f">{i}\n{row}\n" for i, row in enumerate(rows)))
    return [*OPTIONS, f"data.path={folder}"]


def test_two_processes_with_packing_train_and_test_as_one_with_padding(options, tmp_path):
    def work(rank):
        with train.config.clear_errors():
            run(tmp_path / "two", *options, "trainer=ddp_sim", "data.batch_size=4", "data.packing=true")

    codes, said = zip(*two_processes(tmp_path / "said", work), strict=True)
    assert codes == (0, 0), said
    one = run(tmp_path / "one", *options)
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    names = [name for name in one if name.startswith(("train/loss", "val/", "test/")) and not name.endswith("_step")]
    assert len(names) > 10
    assert {n: two[n] for n in names} == pytest.approx({n: one[n] for n in names}, abs=1e-4)
    weights = [load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("one", "two")]
    assert weights[0]["global_step"] == weights[1]["global_step"] == 6
    for name, value in weights[0]["state_dict"].items():
        # Adam divides by the gradient's size: what is nearly 0 there is rounding, and a step is 2e-3
        torch.testing.assert_close(weights[1]["state_dict"][name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_bf16_mixed(options, tmp_path):
    exact = run(tmp_path / "exact", *options, "test=false", "data.packing=true")
    mixed = run(tmp_path / "mixed", *options, "test=false", "data.packing=true", "trainer.precision=bf16-mixed")
    assert mixed["train/loss"] == pytest.approx(exact["train/loss"], rel=2e-2)
    assert mixed["val/loss"] == pytest.approx(exact["val/loss"], rel=2e-2)
    assert mixed["train/loss"] != exact["train/loss"]  # it did run in bf16
