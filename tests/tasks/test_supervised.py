"""The shared step: what it logs, that epochs and not batches are averaged, and optimizer wiring."""

from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import sklearn.metrics as sk
import torch
from runs import QUIET
from torch import nn
from torch.utils.data import DataLoader

from bimamba import optim
from bimamba.spec import DataSpec
from bimamba.strategies import ShardedStrategy
from bimamba.tasks import SupervisedTask

SPEC = DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=6)


class Net(nn.Module):
    """Mean embedding over the mask, then a line."""

    def __init__(self, spec):
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.head = nn.Linear(8, spec.num_outputs)

    def forward(self, inputs, mask=None):
        weight = mask.float()[..., None]
        return self.head((self.embed(inputs) * weight).sum(1) / weight.sum(1))


class Data(pl.LightningDataModule):
    """Random tokens; the label follows the first one. Batches of 16 leave a rest of 5."""

    def __init__(self, spec, n=37, labelled=True):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        inputs = torch.randint(1, 5, (n, 6), generator=g)
        label = (inputs[:, 0] > 2).long()
        if spec.problem == "multilabel":
            label = torch.stack([label, 1 - label, inputs[:, 1] > 3], 1).float()
        elif spec.problem == "regression":
            label = inputs[:, :1].float()
        self.rows = [{"inputs": x, "mask": torch.ones(6, dtype=torch.bool), "id": str(i)} for i, x in enumerate(inputs)]
        if labelled:
            for row, y in zip(self.rows, label, strict=True):
                row["label"] = y
        self.class_counts, self.sizes = torch.tensor([30, 10]), {"train": 40}

    def loader(self):
        return DataLoader(self.rows, batch_size=16)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


def task(spec=SPEC, **options):
    options.setdefault("optimizer", partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1))
    return SupervisedTask(Net(spec), spec, **options)


def trainer(tmp_path, **options):
    options = {"max_epochs": 1, "num_sanity_val_steps": 0, **QUIET, **options}
    return pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, **options)


def specs(problem):
    k = {"binary": 2, "multiclass": 2, "multilabel": 3, "regression": 1}[problem]
    return DataSpec("sequence", problem, tuple("abc"[:k]), alphabet="ACGTN", max_length=6)


@pytest.mark.parametrize("problem", ["binary", "multiclass", "multilabel", "regression"])
def test_every_problem_trains_tests_and_predicts(tmp_path, problem):
    spec = specs(problem)
    data, module = Data(spec), task(spec)
    loop = trainer(tmp_path)
    loop.fit(module, data)
    names = set(loop.callback_metrics)
    first = {"regression": "mse"}.get(problem, "accuracy")
    assert {"train/loss", "train/loss_step", "val/loss", f"val/{first}"} <= names
    (tested,) = loop.test(module, data, verbose=False)
    assert f"test/{first}" in tested
    predicted = loop.predict(module, data)
    assert module.predict_metrics["predict/loss"] == pytest.approx(tested["test/loss"], rel=1e-5)
    assert [i for out in predicted for i in out["id"]] == [str(i) for i in range(37)]


def test_the_epoch_is_measured_not_the_batches(tmp_path):
    data, module = Data(SPEC), task()
    loop = trainer(tmp_path)
    (tested,) = loop.test(module, data, verbose=False)
    out = loop.predict(module, data)
    p, y = (torch.cat([o[k] for o in out]).numpy() for k in ("probabilities", "label"))
    assert tested["test/auroc"] == pytest.approx(sk.roc_auc_score(y, p), abs=1e-6)
    assert tested["test/mcc"] == pytest.approx(sk.matthews_corrcoef(y, p > 0.5), abs=1e-6)
    assert tested["test/loss"] == pytest.approx(sk.log_loss(y, p.astype("float64")), abs=1e-5)
    by_batch = sum(float(o["sample_loss"].mean()) for o in out) / len(out)
    assert tested["test/loss"] != pytest.approx(by_batch, abs=1e-5)  # the rest of 5 does not count as much as 16
    assert module.confusion["test"].sum() == 37


def test_unlabelled_rows_are_predicted_without_metrics(tmp_path):
    module = task()
    out = trainer(tmp_path).predict(module, Data(SPEC, labelled=False))
    assert module.predict_metrics == {} and "label" not in out[0]


def test_balanced_weights_come_from_the_training_split(tmp_path):
    module = task(pos_weight="balanced")
    trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, Data(SPEC))
    assert module.loss.weight.tolist() == [1.0, 3.0]
    fresh = task(pos_weight="balanced")
    fresh.load_state_dict(module.state_dict())  # a test in another process has the same loss
    assert fresh.loss.weight.tolist() == [1.0, 3.0]


def test_schedule_runs_by_step_over_the_whole_training(tmp_path):
    module = task(scheduler=partial(optim.linear, warmup=0))
    loop = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2)
    loop.fit(module, Data(SPEC))
    assert loop.global_step == 4  # ceil(3 / 2) steps an epoch
    assert [g["name"] for g in loop.optimizers[0].param_groups] == ["decay", "no_decay"]
    assert [g["weight_decay"] for g in loop.optimizers[0].param_groups] == [0.1, 0.0]
    assert loop.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)


def test_endless_training_with_a_decaying_schedule_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(task(scheduler=optim.cosine), Data(SPEC))


def test_checkpoints_carry_spec_and_extras_and_load_safely(tmp_path):
    module = task(checkpoint_extras={"recipe": {"seed": 0}})
    loop = trainer(tmp_path, enable_checkpointing=True)
    loop.fit(module, Data(SPEC))
    loop.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert DataSpec.from_dict(saved["spec"]) == SPEC and saved["recipe"] == {"seed": 0}


def test_compiled_names_stay(tmp_path):
    assert task(compile=True).state_dict().keys() == task().state_dict().keys()


def test_a_fused_optimizer_may_clip_where_nothing_is_scaled():
    """Lightning refuses it: that one would unscale gradients by itself, which without a scaler nobody does."""
    moved = []
    for options in ({"fused": True}, {"foreach": False}):
        pl.seed_everything(0)
        one = task(optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, **options))
        before = one.net.head.weight.detach().clone()
        mixed = dict(precision="bf16-mixed", gradient_clip_val=0.1)
        trainer = pl.Trainer(accelerator="cpu", max_epochs=2, **mixed, **QUIET)
        trainer.fit(one, datamodule=Data(SPEC))
        assert trainer.optimizers[0].param_groups[0]["fused"] is options.get("fused")
        moved.append(one.net.head.weight.detach() - before)
    assert moved[0].abs().max() > 1e-3
    torch.testing.assert_close(*moved, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "device", "scaler", "expected"),
    [
        (partial(torch.optim.AdamW, lr=1.0), "cuda", None, {"fused": True}),
        (partial(torch.optim.AdamW, lr=1.0), "cpu", None, {}),
        (partial(torch.optim.AdamW, lr=1.0), "cuda", torch.amp.GradScaler("cpu"), {}),
        (partial(torch.optim.AdamW, lr=1.0, foreach=True), "cuda", None, {}),
        (partial(torch.optim.AdamW, lr=1.0, fused=False), "cuda", None, {}),
        (partial(torch.optim.Adadelta, lr=1.0), "cuda", None, {}),
        (lambda groups: torch.optim.AdamW(groups, lr=1.0), "cuda", None, {}),
    ],
)
def test_gpus_get_the_fused_form(optimizer, device, scaler, expected):
    one = task(optimizer=optimizer)
    strategy = SimpleNamespace(root_device=torch.device(device))
    one._trainer = SimpleNamespace(strategy=strategy, precision_plugin=SimpleNamespace(scaler=scaler))
    assert one._fused() == expected


def test_muon_under_fsdp_is_refused_with_a_way_out():
    one = task(optimizer=partial(optim.Muon, lr=0.01))
    one._trainer, one.hidden = SimpleNamespace(strategy=ShardedStrategy()), {"net.0.weight"}
    with pytest.raises(ValueError, match=r"expected trainer=ddp, or task/optimizer=adamw"):
        one.configure_optimizers()


def test_without_a_decay_of_ones_own_the_optimizers_default_counts():
    one = task(optimizer=partial(optim.Muon, lr=0.01), scheduler=None)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), precision_plugin=None)
    one._trainer = trainer
    assert {g["name"]: g["weight_decay"] for g in one.configure_optimizers().param_groups}["decay"] == 0.1
    one.optimizer = partial(torch.optim.SGD, lr=0.01)
    assert {g["weight_decay"] for g in one.configure_optimizers().param_groups} == {0}
