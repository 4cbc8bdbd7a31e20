"""Averaged weights: their values, what is evaluated, what is saved, and an exact resume."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from runs import DIGITS, load, run, train

from bimamba.callbacks import AverageWeights

OPTIONS = [*DIGITS, "trainer.max_epochs=2", "callbacks.average.decay=0.8", "callbacks.learning_curves=null"]
OPTIONS += ["callbacks.examples=null", "callbacks.model_checkpoint.every_n_train_steps=4"]


class Spy(Callback):
    """Averages the weights on its own, and crashes if told."""

    def __init__(self, crash_after=None):
        self.average, self.updates, self.crash_after, self.validated = None, 0, crash_after, None

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = {k: p.detach().clone() for k, p in pl_module.named_parameters()}
        if self.average is None:
            self.average = weights
        else:
            decay = min(0.8, (1 + self.updates) / (10 + self.updates))
            self.average = {k: decay * a + (1 - decay) * weights[k] for k, a in self.average.items()}
        self.updates += 1
        if trainer.global_step == self.crash_after:
            raise RuntimeError("crash")

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        assert all(torch.equal(p, self.before[k]) for k, p in pl_module.named_parameters())  # the weights are back

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validated = {k: p.detach().clone() for k, p in pl_module.named_parameters()}

    def on_validation_start(self, trainer, pl_module):
        self.before = {k: p.detach().clone() for k, p in pl_module.named_parameters()}


def trained(folder, spy, *overrides):
    made = train.make_callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_callbacks", lambda cfg: [*made(cfg), spy])
        return run(folder, *overrides)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder, spy = tmp_path_factory.mktemp("average"), Spy()
    return folder, spy, trained(folder, spy, *OPTIONS)


def test_the_average_is_validated_and_saved_beside_the_weights(fitted):
    folder, spy, _ = fitted
    saved = load(folder / "checkpoints" / "last.ckpt")
    for name, value in spy.average.items():
        torch.testing.assert_close(saved["state_dict"][name], value, rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(spy.validated[name], saved["state_dict"][name], rtol=0, atol=0, msg=name)
        assert torch.equal(saved["current_model_state"][name], spy.before[name]), name
    assert any(not torch.equal(saved["state_dict"][k], saved["current_model_state"][k]) for k in spy.average)


def test_an_evaluation_chooses(fitted, tmp_path):
    folder, _, metrics = fitted
    given = ["stage=test", f"ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"]
    average, raw = (run(tmp_path / w, *given, f"weights={w}") for w in ("average", "raw"))
    assert average["test/loss"] == pytest.approx(metrics["test/loss"], abs=1e-6)  # also the test after the training
    assert abs(raw["test/loss"] - metrics["test/loss"]) > 1e-4


def test_a_resumed_average_is_that_of_an_uninterrupted_training(fitted, tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        trained(tmp_path, Spy(crash_after=5), *OPTIONS)
    path = tmp_path / "checkpoints" / "last.ckpt"
    run(tmp_path, f"ckpt_path={path}", "test=false")
    whole, parts = load(fitted[0] / "checkpoints" / "last.ckpt"), load(path)
    for key in ("state_dict", "current_model_state", "averaging_state"):
        for name, value in whole[key].items():
            torch.testing.assert_close(parts[key][name], value, rtol=0, atol=0, msg=f"{key} {name}")


def test_bad_options():
    with pytest.raises(ValueError, match=r"callbacks\.average\.decay: expected a number between 0 and 1"):
        AverageWeights(decay=1.0)
    with pytest.raises(ValueError, match="every_n_steps"):
        AverageWeights(decay=0.9, every_n_steps=0)
    assert AverageWeights().off and not AverageWeights(decay=0.9).off
    state = {"state_dict": {}}
    with pytest.raises(ValueError, match="weights=average: the checkpoint was trained without"):
        train.chosen_weights(copy.deepcopy(state), "average")
    with pytest.raises(ValueError, match="expected auto, average or raw, got 'ema'"):
        train.chosen_weights(state, "ema")
    assert train.chosen_weights(state, "raw") == state
