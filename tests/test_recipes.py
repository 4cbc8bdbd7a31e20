"""Recipes by config keys: finders, mixing, balanced sampling, schedules and layer-wise rates in whole runs."""

import pytest
import torch
from lightning.pytorch import Callback
from runs import DIGITS, composed, load, run, train

from bimamba.callbacks import finders
from bimamba.callbacks.finders import scale_rates

SHORT = [*DIGITS, "trainer.max_epochs=1", "test=false", "callbacks.learning_curves=null", "callbacks.examples=null"]


class Spy(Callback):
    def __init__(self):
        self.rates, self.batches, self.labels, self.norms = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.batches.append(len(batch["inputs"]))
        self.labels.append(batch["label"])

    def on_before_zero_grad(self, trainer, pl_module, optimizer):  # what the last step took
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms += [float(torch.nn.utils.get_total_norm(gradients))] if gradients else []


def trained(folder, *overrides):
    spy, made = Spy(), train.make_callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_callbacks", lambda cfg: [*made(cfg), spy])
        return run(folder, *overrides), spy


def test_everything_at_once(tmp_path):
    options = ["data.mix.mixup=0.2", "data.mix.cutmix=1", "data.sampling=balanced", "data.augment.random_erasing=0.2"]
    options += ["task=plateau", "task.layer_decay=0.5", "trainer.accumulate_grad_batches=2", "task.label_smoothing=0.1"]
    options += [
        "trainer.gradient_clip_val=0.01",
        "trainer.log_every_n_steps=1",
        "callbacks.average.decay=0.9",
        "model.drop_path=0.2",
        "monitor=val/mcc",
    ]
    metrics, spy = trained(tmp_path, *SHORT, *options, "monitor_mode=max", "task.scheduler.warmup=2")
    assert max(spy.norms) < 0.0101 and metrics["train/grad_norm"] > 0.1  # clipped, and logged as it was
    assert 0 <= metrics["train/accuracy"] <= 1 and metrics["train/loss"] < 3
    assert spy.labels[0].shape == (256, 10) and spy.labels[0].sum(1).allclose(torch.ones(256))
    assert len(set(spy.rates[-1])) == 3  # embedding, block, head
    assert max(spy.rates[-1]) == pytest.approx(2e-3) and max(spy.rates[0]) == pytest.approx(2e-3 / 3)
    assert load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3  # 6 batches, two a step


def test_a_plateau_counts_epochs_with_a_validation(tmp_path):
    """And not those between, in which nothing was measured."""
    options = ["task=plateau", "task.scheduler.patience=0", "task.scheduler.threshold=0.9", "task.scheduler.warmup=0"]
    options += ["trainer.max_epochs=6", "trainer.check_val_every_n_epoch=2", "trainer.limit_train_batches=1"]
    options += ["callbacks.model_checkpoint.every_n_epochs=2"]
    _, spy = trained(tmp_path / "run", *SHORT, *options)
    highest = [max(rates) for rates in spy.rates]
    assert highest == pytest.approx([2e-3] * 4 + [1e-3] * 2)  # validated behind the second epoch, and the fourth
    with pytest.raises(ValueError, match=r"task\.scheduler\.monitor: expected one of .*val/loss.*, got val/lost"):
        trained(tmp_path / "wrong", *SHORT, *options, "task.scheduler.monitor=val/lost", "task.scheduler.mode=min")


@pytest.mark.parametrize("option", ["task=constant_rate", "task=linear_rate"])
def test_the_other_schedules_run(tmp_path, option):
    _, spy = trained(tmp_path, *SHORT, option, "trainer.limit_train_batches=4", "task.scheduler.warmup=1")
    rising, *rest = (max(r) for r in spy.rates)
    assert rising == pytest.approx(1e-3) and (len(set(rest)) == 1) == ("constant" in option)


def test_the_rate_that_is_found_is_the_schedules_highest(tmp_path, monkeypatch):
    options = ["callbacks=lr_finder", "callbacks.lr_finder.num_training_steps=40", "task.scheduler.warmup=2"]
    said, drawn, draw = [], [], finders.plots.rate_finder
    monkeypatch.setattr("bimamba.callbacks.finders.rank_zero_info", said.append)
    monkeypatch.setattr(finders.plots, "rate_finder", lambda *args: drawn.append(args) or draw(*args))
    _, spy = trained(tmp_path, *SHORT, *options)
    found = float(said[0].rpartition("=")[2])
    assert 1e-6 < found < 1 and (tmp_path / "plots" / "learning_rate_finder.png").stat().st_size > 5000
    assert 2.1 < drawn[0][1][0] < 2.5 and 2.1 < drawn[0][1][9] < 2.5  # the loss of ten equal classes, from the start
    training = [max(r) for r in spy.rates[-6:]]  # after those of the search
    assert training[:3] == pytest.approx([found / 3, found * 2 / 3, found], rel=5e-3) and training[3] < training[2]
    assert load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 6


def test_the_batch_size_that_is_found_is_trained_with(tmp_path):
    options = ["callbacks=batch_size_finder", "callbacks.batch_size_finder.init_val=64", "task.scheduler.final_ratio=0"]
    options += ["callbacks.batch_size_finder.max_trials=2", "callbacks.batch_size_finder.steps_per_trial=1"]
    _, spy = trained(tmp_path, *SHORT, *options)
    size = spy.batches[-11]
    assert size == 128 and sum(spy.batches[-11:]) == 1294  # eleven batches of 128 and a rest
    assert max(spy.rates[-1]) == pytest.approx(0.0, abs=1e-9)  # the schedule ends with the training


def test_rates_scale_where_schedules_begin():
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 4.0)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    class Trainer:
        optimizers = (optimizer,)
        lr_scheduler_configs = (type("Config", (), {"scheduler": scheduler}),)

    scale_rates(Trainer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 2.0]
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 1.0]


def test_options_that_make_no_sense(tmp_path):
    with pytest.raises(Exception, match=r"data\.sampling: expected shuffled or balanced, got 'often'"):
        run(tmp_path, *SHORT, "data.sampling=often")
    assert composed(tmp_path, "callbacks=lr_finder").callbacks.lr_finder.apply
