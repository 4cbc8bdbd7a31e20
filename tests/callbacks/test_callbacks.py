"""Callbacks on their own: rates, gradient norm, examples, and predictions of every problem."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torchmetrics import MeanMetric

from bimamba import plots
from bimamba.callbacks import (
    ExamplePredictions,
    GradientNorm,
    LearningCurves,
    NetworkSummary,
    ProgressBar,
    Throughput,
)
from bimamba.callbacks.checkpoints import processes_meet
from bimamba.predictions import decide, prediction_table
from bimamba.spec import DataSpec
from bimamba.tasks.base import Task as BaseTask


def spec(problem, k, kind="sequence"):
    shape = {"alphabet": "ACGTN", "max_length": 9}
    if kind == "image":
        shape = {"channels": 1, "height": 4, "width": 4, "mean": (0.5,), "std": (0.25,)}
    return DataSpec(kind, problem, tuple("abcdefgh"[:k]), **shape)


class Log:
    """Stands for trainer, logger and module: remembers what is logged."""

    def __init__(self, **values):
        self.seen = {}
        self.__dict__.update(values)

    def log(self, name, value, **_):
        self.seen[name] = float(value)

    def log_metrics(self, metrics, step):
        self.seen.update(metrics)


def test_gradient_norm_is_that_of_all_gradients():
    net = torch.nn.Linear(3, 2)
    net(torch.ones(1, 3)).sum().backward()
    net.log, seen = (lambda name, value, **_: seen.update({name: float(value)})), {}
    trainer = SimpleNamespace(global_step=9, log_every_n_steps=10, strategy=None)
    GradientNorm().on_before_optimizer_step(trainer, net, None)
    assert seen["train/grad_norm"] == pytest.approx(8**0.5)
    seen.clear()
    trainer.global_step = 10  # not a logged step
    GradientNorm().on_before_optimizer_step(trainer, net, None)
    assert not seen


def test_throughput_leaves_out_first_steps_validation_and_padding(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("bimamba.callbacks.throughput.time.perf_counter", lambda: clock.now)
    logger = Log()
    trainer = SimpleNamespace(
        log_every_n_steps=2, is_last_batch=False, world_size=2, loggers=[logger], callback_metrics={}, global_step=1
    )
    module = SimpleNamespace(device=torch.device("cpu"))
    batch = {"inputs": torch.zeros(4, 6), "mask": torch.ones(4, 6, dtype=torch.bool)}
    batch["mask"][:, 3:] = False
    callback = Throughput(skip_steps=1)
    callback.on_train_start(trainer, module)
    callback.on_train_epoch_start(trainer, module)
    for i, seconds in enumerate((100.0, 1.0, 2.0, 2.0)):
        callback.on_train_batch_start(trainer, module, batch, i)
        clock.now += seconds
        callback.on_train_batch_end(trainer, module, None, batch, i)
        if i == 2:
            callback.on_validation_start(trainer, module)
            clock.now += 50.0
    # steps 2 and 3 of the second window: 8 samples in 4 seconds, on each of two processes
    assert logger.seen["performance/samples_per_second"] == pytest.approx(4.0)
    assert logger.seen["performance/tokens_per_second"] == pytest.approx(12.0)


def test_learning_curves_keep_their_history(tmp_path):
    callback = LearningCurves(str(tmp_path))
    callback.history = [{"epoch": 0, "step": 5, "train/loss": 1.0, "val/loss": 2.0}]
    other = LearningCurves(str(tmp_path))
    other.load_state_dict(callback.state_dict())
    assert other.history == callback.history


def test_learning_curves_show_a_validation_once(tmp_path):
    """callback_metrics keeps the last validation's figures; epochs without a validation must not repeat them."""
    callback = LearningCurves(str(tmp_path))
    metrics = {"train/loss": torch.tensor(1.0), "val/loss": torch.tensor(2.0)}
    trainer = Log(is_global_zero=False, sanity_checking=True, global_step=1, callback_metrics=metrics)
    callback.on_validation_end(trainer, None)  # the sanity check's, which is none
    trainer.sanity_checking = False
    for trainer.current_epoch in range(4):
        if trainer.current_epoch in (1, 3):
            callback.on_validation_end(trainer, None)
        callback.on_train_epoch_end(trainer, None)
    assert [row["epoch"] for row in callback.history if "val/loss" in row] == [1, 3]
    assert all("train/loss" in row for row in callback.history)


@pytest.mark.parametrize(("kind", "name"), [("image", "examples_val.png"), ("sequence", "examples_val.csv")])
def test_examples_are_the_first_and_the_worst(tmp_path, kind, name):
    module = SimpleNamespace(spec=spec("binary", 2, kind))
    trainer = Log(
        is_global_zero=True, sanity_checking=False, fast_dev_run=False, current_epoch=0, max_epochs=1, loggers=[]
    )
    callback = ExamplePredictions(str(tmp_path), first=2, worst=1)
    callback.on_validation_epoch_start(trainer, module)
    losses = torch.tensor([0.1, 0.2, 0.3, 5.0, 0.4, 0.1])
    for start in (0, 3):
        rows = slice(start, start + 3)
        batch = {"inputs": torch.zeros(3, 1, 4, 4)}
        if kind == "sequence":
            batch = {"inputs": torch.tensor([[1, 2, 3, 0]] * 3), "mask": torch.tensor([[True, True, True, False]] * 3)}
        outputs = {
            "id": [str(i) for i in range(start, start + 3)],
            "sample_loss": losses[rows],
            "probabilities": torch.tensor([0.9, 0.2, 0.7]),
            "label": torch.tensor([1, 1, 0]),
        }
        callback.on_validation_batch_end(trainer, module, outputs, batch, 0)
    assert [r["id"] for r in callback._kept] == ["0", "1", "3"]
    callback.on_validation_epoch_end(trainer, module)
    assert (tmp_path / name).stat().st_size > 0
    if kind == "sequence":
        lines = (tmp_path / name).read_text().splitlines()
        assert lines[0].startswith("id,why,label,prediction") and lines[1].endswith("ACG")


def test_prediction_tables_of_every_problem():
    ids = ["x", "y"]
    table = prediction_table(spec("binary", 2), ids, np.array([0.5, 0.8]), np.array([0, 1])).to_pylist()
    assert [r["prediction"] for r in table] == ["a", "b"] and table[1]["label"] == "b"
    assert table[1]["probability_a"] == pytest.approx(0.2)
    table = prediction_table(spec("multilabel", 3), ids, np.array([[0.9, 0.1, 0.6], [0, 0, 0]]), None).to_pylist()
    assert [r["prediction"] for r in table] == [["a", "c"], []] and "label" not in table[0]
    table = prediction_table(spec("regression", 1), ids, np.array([[1.5], [2]]), np.array([[1.0], [2]])).to_pylist()
    assert (table[0]["prediction_a"], table[0]["label_a"]) == (1.5, 1.0)
    assert decide(spec("multiclass", 3), np.array([[0.1, 0.2, 0.7]]))[0] == ("c", "0.70")


@pytest.mark.parametrize("k", [2, 10, 60])
def test_confusion_matrices_of_any_size_are_drawn(tmp_path, k):
    plots.confusion_matrix(np.eye(k, dtype=int), [f"class {i}" for i in range(k)]).savefig(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert np.asarray(image.convert("RGB")).std() > 5


def test_the_other_plots_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    p, y = rng.random(50), rng.integers(0, 2, 50)
    figures = [
        plots.roc_and_precision_recall(p, y, "yes"),
        plots.reliability(p, y, "probability"),
        plots.regression_scatter(rng.random((9, 2)), rng.random((9, 2)), ["a", "b"]),
        plots.confusion_matrix(np.ones((3, 2, 2), dtype=int), ["a", "b", "c"]),
        plots.learning_curves([{"epoch": i, "train/loss": 1 / (i + 1), "val/loss": 1.0} for i in range(3)], 1),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 5000


def test_the_summary_is_of_the_network_alone(capsys):
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(3, 2))
            self.train_loss = MeanMetric()

    trainer = SimpleNamespace(is_global_zero=True, strategy=None, world_size=1)
    NetworkSummary(max_depth=2).on_fit_start(trainer, Module())
    said = capsys.readouterr().out
    assert "net.0" in said and "Linear" in said and "MeanMetric" not in said
    assert "Trainable params: 8" in said


def test_the_bar_reads_the_loss_now_and_then(monkeypatch):
    """Each reading waits for the device: twice a second, not at every step, and nothing where nothing was logged."""
    now, reads = [100.0], []

    class Losses(dict):
        def get(self, name):
            reads.append(now[0])
            return torch.tensor(now[0]) if name == "train/loss_step" and now[0] > 100.0 else None

    monkeypatch.setattr("bimamba.callbacks.progress.time.monotonic", lambda: now[0])
    trainer = SimpleNamespace(
        training=True, loggers=[], progress_bar_metrics={"val/loss": 2.0}, callback_metrics=Losses()
    )
    bar = ProgressBar(seconds=0.5)
    assert bar.get_metrics(trainer, None) == {"val/loss": 2.0}
    reads.clear()
    for now[0] in (101.0, 101.2, 101.4, 101.6, 101.8):
        shown = bar.get_metrics(trainer, None)
    assert shown == {"val/loss": 2.0, "train/loss_step": pytest.approx(101.6)} and reads == [101.0, 101.6]
    trainer.training = False
    now[0] = 200.0
    assert bar.get_metrics(trainer, None)["train/loss_step"] == pytest.approx(101.6) and len(reads) == 2


def test_no_step_waits_for_the_bar():
    """What Lightning reads at each step for the bar: nothing of the training step."""
    given = {}

    class Look(ProgressBar):
        def on_train_batch_end(self, trainer, *args):
            given["pbar"] = dict(trainer.progress_bar_metrics)
            given["shown"] = self.get_metrics(trainer, args[0])

    class Tiny(LightningModule):
        training_step, _followed = BaseTask.training_step, False

        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 2)

        def shared_step(self, batch, stage):
            return {"loss": self.net(batch["x"]).square().mean()}

        def train_metrics(self):
            return {}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    rows = [{"x": torch.ones(3), "id": k} for k in range(4)]
    trainer = Trainer(
        max_epochs=1, callbacks=[Look()], logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(Tiny(), torch.utils.data.DataLoader(rows, batch_size=2))
    assert "train/loss_step" not in given["pbar"] and given["shown"]["train/loss_step"] >= 0.0


@pytest.mark.parametrize(("accumulate", "every"), [(1, 10), (7, 10), (64, 50), (4, 1)])
def test_processes_ask_each_other_about_as_often_as_they_log(accumulate, every):
    trainer = SimpleNamespace(world_size=2, log_every_n_steps=every, accumulate_grad_batches=accumulate)
    ends = range(accumulate - 1, 1000, accumulate)
    asked = [i + 1 for i in ends if processes_meet(trainer, i)]
    gaps = [b - a for a, b in itertools.pairwise([0, *asked])]
    assert max(gaps) < every + accumulate and min(gaps) > max(every - accumulate, 0)
    trainer.world_size = 1
    assert all(processes_meet(trainer, i) for i in ends)
