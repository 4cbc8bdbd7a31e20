"""NaN and infinity are found where they arise, saved, replayed by the printed command, and answered as configured."""

import math
import re
import shlex

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from runs import DIGITS, load, run, train
from torch import nn

from bimamba import nonfinite
from bimamba import replay as replaying
from bimamba.callbacks import NumericalHealth
from bimamba.callbacks.health import largest_values

SHORT = [*DIGITS, "trainer.max_epochs=1", "test=false", "callbacks.learning_curves=null", "callbacks.examples=null"]
SHORT += ["model.dropout=0.1", "data.augment.random_erasing=0.3", "callbacks.gradient_norm.update_ratio=true"]
SHORT += ["trainer.log_every_n_steps=2"]


class Break(Callback):
    """Makes one weight so large that a product overflows, for one step; keeps what the steps before and after saw."""

    def __init__(self, at, name="backbone.blocks.0.mixer.out_proj.weight"):
        self.at, self.name, self.rates, self.kept, self.losses = at, name, [], None, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["initial_lr"])
        if trainer.global_step in self.at and batch_idx in self.at:
            self.weights = {k: v.clone() for k, v in pl_module.state_dict().items()}
            parameter = pl_module.net.get_parameter(self.name)
            self.kept = parameter.detach().clone()
            parameter.data.fill_(3e38)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        if self.kept is not None:
            pl_module.net.get_parameter(self.name).data.copy_(self.kept)
            for name, value in pl_module.state_dict().items():
                assert torch.equal(value, self.weights[name]), f"{name} was changed by a step that is left out"
            self.kept = None


def broken(folder, spy, *overrides):
    made = train.make_callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_callbacks", lambda cfg: [*made(cfg), spy])
        return run(folder, *SHORT, *overrides)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_it_stops_names_the_place_and_the_printed_command_replays_it(tmp_path, capsys, precision):
    with pytest.raises(SystemExit) as caught, train.config.clear_errors():
        broken(tmp_path, Break([3]), f"trainer.precision={precision}")
    said = str(caught.value)
    path = tmp_path / "nonfinite" / "step_3.ckpt"
    assert "not finite at step 3 (epoch 0, batch 3): the output of net.backbone.blocks.0.mixer.out_proj (" in said
    command = re.search(r"Replay with:  python -m bimamba\.replay (.*)", said).group(1)
    assert shlex.split(command) == [str(path)]
    saved = load(path)
    assert saved["global_step"] == 3 and saved["nonfinite"]["batch"]["inputs"].shape == (256, 1, 8, 8)
    assert replaying.main([str(path), "--accelerator", "cpu"]) == 0
    then, now = capsys.readouterr().out.split("at the time: ")[1].split("\nnow:         ")
    assert now.strip() == then.strip() and "infinite of" in then


def test_it_leaves_a_step_out_and_lowers_the_rate(tmp_path):
    spy = Break([1, 3])
    with pytest.warns(UserWarning, match=r"left out, and the learning rate multiplied by 0\.25"):
        metrics = broken(tmp_path, spy, "callbacks.health.action=lower", "callbacks.health.factor=0.25")
    assert spy.rates == pytest.approx([2e-3, 2e-3, 5e-4, 5e-4, 1.25e-4, 1.25e-4])
    assert math.isfinite(metrics["val/loss"]) and 0 < metrics["train/update_ratio"] < 0.1
    assert not math.isfinite(spy.losses[1]) and all(math.isfinite(v) for v in spy.losses[4:])
    assert sorted(p.name for p in (tmp_path / "nonfinite").iterdir()) == ["step_1.ckpt", "step_3.ckpt"]


class Infinite(Callback):
    """Puts an infinity into the batches of some steps; notes the weights before each, and who waited for the answer."""

    def __init__(self, at):
        self.at, self.before, self.waits, self.validated, self.interrupt_at = at, [], [], [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
        if trainer.global_step in self.at:
            batch["inputs"][5, 0, 3, 3] = torch.inf

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        health = next(c for c in trainer.callbacks if isinstance(c, NumericalHealth))
        self.waits.append(health._unsettled is None)
        if trainer.global_step == self.interrupt_at:
            raise RuntimeError("something else")

    def on_validation_start(self, trainer, pl_module):
        self.validated += [] if trainer.sanity_checking else [trainer.global_step]


FUSED = "+task.optimizer.fused=true"  # as it is on a GPU


def test_a_fused_optimizer_leaves_the_step_out_and_nobody_waits(tmp_path, capsys):
    spy = Infinite([3])
    with pytest.raises(SystemExit) as caught, train.config.clear_errors():
        broken(tmp_path, spy, FUSED)
    path = tmp_path / "nonfinite" / "step_3.ckpt"
    assert "not finite at step 3 (epoch 0, batch 3): the batch's inputs are not finite (0 NaN and 1" in str(
        caught.value
    )
    assert len(spy.before) == 5 and not any(spy.waits)  # found in the next step, before its update
    saved = load(path)
    for weights in (spy.before[4], saved["state_dict"]):
        assert all(torch.equal(weights[name], value) for name, value in spy.before[3].items())
    assert any(not torch.equal(spy.before[2][name], value) for name, value in spy.before[3].items())
    assert {int(s["step"]) for s in saved["optimizer_states"][0]["state"].values()} == {3}
    assert replaying.main([str(path), "--accelerator", "cpu"]) == 0
    then, now = capsys.readouterr().out.split("at the time: ")[1].split("\nnow:         ")
    assert now.strip() == then.strip()


@pytest.mark.parametrize("action", ["skip", "lower"])
def test_a_step_left_out_by_the_optimizer_is_one_left_out_by_the_host(tmp_path, monkeypatch, action):
    """Bit by bit, and a lower rate holds from the next step on."""
    options = [FUSED, f"callbacks.health.action={action}", "callbacks.health.factor=0.25", "task.scheduler=null"]
    spies = {waits: Infinite([1, 4] if action == "skip" else [4]) for waits in (False, True)}
    found = {}
    for waits, spy in spies.items():
        monkeypatch.setattr("bimamba.callbacks.health._leaves_out", lambda optimizer, w=waits: not w)
        with pytest.warns(UserWarning, match="The step is left out"):
            broken(tmp_path / str(waits), spy, *options)
        assert spy.waits == [*[waits] * 5, True]  # a validation follows the last
        found[waits] = load(tmp_path / str(waits) / "checkpoints" / "last.ckpt")
        files = sorted(p.name for p in (tmp_path / str(waits) / "nonfinite").iterdir())
        assert files == [f"step_{n}.ckpt" for n in spy.at]
    for name, value in found[True]["state_dict"].items():
        torch.testing.assert_close(found[False]["state_dict"][name], value, rtol=0, atol=0)


def test_the_last_step_of_an_epoch_is_looked_at_before_it_is_saved(tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite at step 5 \(epoch 0, batch 5\)"):
        broken(tmp_path, Infinite([5]), FUSED, "trainer.max_epochs=2")
    assert [p.name for p in tmp_path.rglob("*.ckpt")] == ["step_5.ckpt"]


def test_a_step_is_looked_at_before_a_validation(tmp_path):
    spy = Infinite([2])
    with pytest.raises(FloatingPointError, match=r"not finite at step 2 .*the batch's inputs are not finite"):
        broken(tmp_path, spy, FUSED, "trainer.val_check_interval=3")
    assert not spy.validated and len(spy.before) == 3


def test_a_step_that_nothing_follows_is_mentioned_all_the_same(tmp_path):
    spy = Infinite([2])
    spy.interrupt_at = 3
    with (
        pytest.warns(UserWarning, match=r"not finite at step 2 \(epoch 0\), the last one\. It is left out"),
        pytest.raises(RuntimeError, match="something else"),
    ):
        broken(tmp_path, spy, FUSED)


def test_a_state_without_a_fused_form_is_resumed_by_a_fused_optimizer(tmp_path, monkeypatch):
    """Trained on a CPU, resumed on a GPU, where the default is fused: the state brings its own form."""
    broken(tmp_path, Infinite([]))
    monkeypatch.setattr("bimamba.tasks.base.Task._fused", lambda self: {"fused": True})
    spy = Infinite([8])
    options = [f"ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}", "trainer.max_epochs=2"]
    with pytest.warns(UserWarning, match="(?s)not finite at step 8 .*The step is left out"):
        broken(tmp_path, spy, *options, "callbacks.health.action=skip")
    assert spy.waits == [True] * 6


def test_a_checkpoint_in_mid_epoch_is_not_saved_before_its_step_was_looked_at(tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite at step 3 "):
        broken(tmp_path, Infinite([3]), FUSED, "callbacks.model_checkpoint.every_n_train_steps=2")
    assert load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_a_full_disk_hides_neither_what_was_found_nor_that_it_is_full(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bimamba.atomic.os.fsync", full)
    with pytest.raises(FloatingPointError, match=r"(?s)not finite at step 3 .*cannot be replayed: .*No space left"):
        broken(tmp_path, Break([3]), "callbacks.health.action=skip", "callbacks.model_checkpoint=null")


def test_it_does_not_skip_for_ever(tmp_path):
    options = ["callbacks.health.action=skip", "callbacks.health.max_skips=2", "callbacks.health.max_saved=1"]
    with pytest.warns(UserWarning), pytest.raises(FloatingPointError, match="The last 2 steps were left out already"):
        broken(tmp_path, Break([1, 2, 3]), *options)
    assert [p.name for p in (tmp_path / "nonfinite").iterdir()] == ["step_1.ckpt"]


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


class Task(LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.root, self.last = nn.Linear(2, 2), Root(), nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        self.log("loss", 0.0)
        return self.last(self.root(self.first(batch["inputs"]).abs())).mean()


def test_a_gradient_that_is_not_finite_is_traced_to_the_module_that_made_it():
    torch.manual_seed(0)
    task, batch = Task(), {"inputs": torch.rand(4, 2), "id": ["a"]}
    assert nonfinite.trace(task, batch)[0] is None
    nn.init.zeros_(task.first.weight)
    nn.init.zeros_(task.first.bias)  # sqrt(0): finite, its slope is not
    finding, loss = nonfinite.trace(task, batch)
    assert finding.module == "root" and finding.tensor == "gradient of first" and torch.isfinite(loss)
    assert "made by the backward pass of root" in str(finding)
    assert all(p.grad is None for p in task.parameters()) and "log" not in vars(task)
    # of a step that is over, in a network that cannot run by itself: what was kept of the gradients
    numbers = [i for i, (name, _) in enumerate(task.named_parameters()) if name in ("first.bias", "last.weight")]
    largest = torch.tensor([1.0, torch.inf])
    finding, number = nonfinite.as_it_stands(task, [(batch,)] * 2, [torch.zeros(())] * 2, numbers, largest)
    assert str(finding) == "the gradient of the parameter last.weight (largest value inf)" and number == 1
    batch["inputs"][0, 0] = torch.inf
    assert nonfinite.trace(task, batch)[0].tensor == "input inputs"
    task.last.bias.data.fill_(torch.nan)
    assert nonfinite.trace(task, batch)[0].tensor == "parameter last.bias"


def test_large_gradients_are_finite():
    assert torch.isfinite(largest_values([torch.full((4,), 1e30), torch.zeros(3)]).sum())  # their 2-norm is not
    bad = [torch.tensor([0.0, torch.nan]), torch.tensor([torch.inf, torch.nan]), torch.tensor([-torch.inf])]
    assert not largest_values(bad).isfinite().any()


def test_bad_options_and_files(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"callbacks\.health\.action: expected one of stop, skip, lower, got 'halt'"):
        NumericalHealth("x", action="halt")
    with pytest.raises(ValueError, match="0 < factor < 1"):
        NumericalHealth("x", factor=2.0)
    assert replaying.main([str(tmp_path / "none.ckpt")]) == 2
    torch.save({"state_dict": {}, "spec": {}, "recipe": {}}, tmp_path / "other.ckpt")
    assert replaying.main([str(tmp_path / "other.ckpt")]) == 2
    said = capsys.readouterr().err
    assert "no such file" in said and "expected a file that callbacks.health wrote" in said
