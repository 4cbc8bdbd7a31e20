"""Masked-token pretraining end to end: learns a repeat, and a classifier starts from it; two commands."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from runs import TINY, load, run

from bimamba.models import Classifier
from bimamba.nn import BiMamba2, TokenPooling
from bimamba.spec import DataSpec
from bimamba.tasks import MaskedTokenTask

SPEC = DataSpec("sequence", "multiclass", tuple("ACGT"), alphabet="ACGTN", max_length=16)
QUIET = ["callbacks.learning_curves=null", "logger=none", "trainer.num_sanity_val_steps=0"]
PRETRAIN = ["experiment=dna_pretrain", *TINY, *QUIET]


def genome(path):
    """A repeat of seven letters: a hidden one is known from its neighbours."""
    text = "ACCTGAT" * 1500
    path.write_text(
        "".join(f">chr{i}\n" + "\n".join(text[j : j + 70] for j in range(i, 10_000, 70)) + "\n" for i in (0, 3))
    )
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The first command; read only."""
    folder = tmp_path_factory.mktemp("pretrained")
    fasta = genome(folder / "genome.fa")
    options = ["data.window=64", "data.batch_size=16", "trainer.max_epochs=5", "task.optimizer.lr=0.02"]
    # The other strand of this repeat is another repeat: half of the windows each, in half of the time.
    metrics = run(folder, *PRETRAIN, f"data.path={fasta}", *options, "data.augment.reverse_complement=0")
    return folder, metrics


def test_a_repeat_is_learned(pretrained):
    _, metrics = pretrained
    assert metrics["test/loss"] < 0.7 * math.log(4) and metrics["test/accuracy"] > 0.6  # chance: ln 4 and 0.29
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]), rel=1e-4)
    assert metrics["val/loss"] < math.log(4) and metrics["train/loss"] < math.log(4)


def test_its_checkpoint_is_tested_again(pretrained, tmp_path):
    best = pretrained[0] / "checkpoints" / "best.ckpt"
    metrics = run(tmp_path, "stage=test", f"ckpt_path={best}", "extras.print_config=false", "logger=none")
    assert metrics["test/loss"] == pytest.approx(pretrained[1]["test/loss"], abs=1e-5)
    assert not (tmp_path / "predictions.parquet").exists()
    with pytest.raises(ValueError, match="fine-tune it first"):
        run(tmp_path, "stage=predict", f"ckpt_path={best}", "data.predict=x.fa", "extras.print_config=false")


def test_a_classifier_starts_from_it(pretrained, tmp_path):
    """The second command: experiment=promoters has the same network, less positions and head."""
    rng = np.random.default_rng(0)
    for name in ("promoter", "other"):
        rows = ("".join(rng.choice(list("ACGT"), 40)) for _ in range(20))
        (tmp_path / f"{name}.fa").write_text("".join(f">{i}\n{row}\n" for i, row in enumerate(rows)))
    best = pretrained[0] / "checkpoints" / "best.ckpt"
    options = ["model.freeze=backbone", "trainer.max_epochs=1", "test=false", "callbacks.examples=null"]
    arguments = ["experiment=promoters", *TINY, *QUIET, f"data.path={tmp_path}", f"model.pretrained={best}", *options]
    run(tmp_path / "run", *arguments)
    given, tuned = (load(path)["state_dict"] for path in (best, tmp_path / "run" / "checkpoints" / "best.ckpt"))
    same = {
        name for name in tuned if name in given and name.startswith("net.") and torch.equal(tuned[name], given[name])
    }
    assert "net.embedding.embed.weight" in same and "net.backbone.blocks.0.mixer.in_proj.weight" in same
    new = {name for name in tuned if name.startswith("net.")} - same
    assert new == {"net.embedding.positions.table", "net.head.proj.bias", "net.head.proj.weight"}
    with pytest.raises(ValueError, match=r"another model: .*mixer\.d_state: 8 there, 4 here"):
        run(tmp_path / "other", *arguments, "model.mixer.d_state=4")


# ------------------------------------------------------------------------------------------------------------- the task


def task(pooling=TokenPooling, **options):
    net = Classifier(SPEC, d_model=16, depth=1, mixer=partial(BiMamba2, headdim=8, d_state=4), pooling=pooling)
    return MaskedTokenTask(net, SPEC, partial(torch.optim.SGD, lr=0.1), **options)


def batch():
    inputs = torch.tensor([[1, 2, 5, 4, 0], [5, 5, 1, 3, 2]])
    label = torch.tensor([[-100, -100, 2, -100, -100], [0, -100, 1, -100, -100]])
    return {"inputs": inputs, "mask": inputs > 0, "label": label, "id": ["a", "b"]}


def test_the_loss_is_of_hidden_letters_alone():
    made, given = task().eval(), batch()
    out = made.shared_step(given, "val")
    log_p = made(given).log_softmax(-1)
    expected = -(log_p[0, 2, 2] + log_p[1, 0, 0] + log_p[1, 2, 1]) / 3
    torch.testing.assert_close(out["loss"], expected)
    made.shared_step({k: v[:1] for k, v in given.items()}, "val")  # the epoch weighs letters, not batches
    values = made.finish("val")
    torch.testing.assert_close(values["val/loss"], (3 * expected - log_p[0, 2, 2]) / 4)
    right = (log_p.argmax(-1) == given["label"]).sum() + (log_p[0].argmax(-1) == given["label"][0]).sum()
    assert values["val/accuracy"] == pytest.approx(int(right) / 4)


def test_a_batch_without_hidden_letters_is_no_nan():
    given = batch() | {"label": torch.full((2, 5), -100)}
    loss = task().shared_step(given, "train")["loss"]
    loss.backward()
    assert loss == 0


def test_a_network_without_an_output_a_token_is_refused():
    from bimamba.nn import MeanPooling

    with pytest.raises(ValueError, match="choose model/pooling=tokens"):
        task(MeanPooling).shared_step(batch(), "train")
    with pytest.raises(ValueError, match="label_smoothing"):
        task(label_smoothing=1.0)
