"""A training that was stopped goes on as if it had not been: order, random numbers, augmentation, metrics, folder."""

import contextlib
import json
import os
import resource
import signal
import warnings

import pytest
import torch
from hydra.errors import InstantiationException
from lightning.pytorch import Callback
from runs import DIGITS, load, run, train

from bimamba.atomic import AtomicCheckpointIO
from bimamba.callbacks import Checkpoints, interrupt
from bimamba.collect import find_runs
from bimamba.export import find_metrics

# 9 batches an epoch, with everything that draws random numbers.
OPTIONS = [*DIGITS, "data.batch_size=160", "test=false", "trainer.max_epochs=2", "data.augment.random_erasing=0.5"]
OPTIONS += [
    "model.dropout=0.1",
    "model.drop_path=0.1",
    "callbacks.model_checkpoint.every_n_train_steps=2",
    "trainer.log_every_n_steps=4",
]
OPTIONS += [
    "callbacks.learning_curves=null",
    "callbacks.examples=null",
    "trainer.num_sanity_val_steps=0",
    "callbacks.throughput=null",
]


class Losses(Callback):
    """Remembers the loss of every step, and stops after one of them as a crash would."""

    number = signal.SIGTERM

    def __init__(self, crash_after=None, signal_at=None):
        self.seen, self.validated, self.crash_after, self.signal_at = {}, {}, crash_after, signal_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.signal_at:
            os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        self.seen[step] = (outputs["loss"].item(), batch["id"][0], batch["inputs"].sum().item())
        if step == self.crash_after:
            raise RuntimeError("crash")

    def on_validation_end(self, trainer, pl_module):
        self.validated[trainer.global_step] = trainer.callback_metrics["val/loss"].item()


def trained(folder, spy, *overrides, monkeypatch):
    with monkeypatch.context() as patch:
        made = train.make_callbacks
        patch.setattr(train, "make_callbacks", lambda cfg: [*made(cfg), spy])
        metrics = run(folder, *overrides)
    return metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted training: what each step saw, its metrics, its weights."""
    spy, folder = Losses(), tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        metrics = trained(folder, spy, *OPTIONS, monkeypatch=patch)
    return spy.seen, metrics, load(folder / "checkpoints" / "last.ckpt")


def same_weights(one, two):
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("crash", "workers"), [(9, 0), (13, 1)])
def test_resumed_in_mid_epoch_it_equals_an_uninterrupted_one(whole, tmp_path, monkeypatch, crash, workers):
    first, second = Losses(crash_after=crash), Losses()
    with pytest.raises(RuntimeError, match="crash"):
        trained(tmp_path, first, *OPTIONS, monkeypatch=monkeypatch)
    path = tmp_path / "checkpoints" / "last.ckpt"
    step = load(path)["global_step"]
    assert step == crash // 2 * 2 and step % 9  # in mid-epoch
    options = [f"ckpt_path={path}", f"data.num_workers={workers}"]
    metrics = trained(tmp_path, second, *options, monkeypatch=monkeypatch)
    seen, expected, weights = whole
    assert list(second.seen) == list(range(step + 1, 19))
    assert {**first.seen, **second.seen} == seen  # the very bits
    assert metrics == {
        k: expected[k] for k in metrics
    }  # also the epoch's mean loss and accuracy, whose first part came before the crash
    same_weights(weights, load(path))


def test_after_kill_9_it_goes_on_from_the_last_step_checkpoint(whole, tmp_path, monkeypatch):
    class Kill(Losses):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            (tmp_path / "seen.json").write_text(json.dumps(self.seen))
            if args[0].global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()  # a process of its own, without ten seconds of imports
    if child == 0:
        with contextlib.suppress(BaseException):
            trained(tmp_path, Kill(), *OPTIONS, monkeypatch=monkeypatch)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    before = {int(k): tuple(v) for k, v in json.loads((tmp_path / "seen.json").read_text()).items()}
    path, spy = tmp_path / "checkpoints" / "last.ckpt", Losses()
    assert load(path)["global_step"] == 4
    trained(tmp_path, spy, f"ckpt_path={path}", monkeypatch=monkeypatch)
    assert {**before, **spy.seen} == whole[0] and min(spy.seen) == 5
    same_weights(whole[2], load(path))


@pytest.mark.parametrize(("at", "stopped"), [(2, 3), (8, 9)])
def test_sigterm_saves_and_stops_with_its_number(whole, tmp_path, monkeypatch, capfd, at, stopped):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        trained(tmp_path, Losses(signal_at=at), *OPTIONS, monkeypatch=monkeypatch)
    assert caught.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == handler
    path = tmp_path / "checkpoints" / "interrupted.ckpt"
    assert f"python train.py ckpt_path={path}" in capfd.readouterr().out
    assert load(path)["global_step"] == stopped  # the batch in hand was finished; at an epoch's end, its validation
    spy = Losses()
    metrics = trained(tmp_path, spy, f"ckpt_path={path}", monkeypatch=monkeypatch)
    assert spy.seen == {k: v for k, v in whole[0].items() if k > stopped}
    assert metrics == {k: whole[1][k] for k in metrics}
    assert not path.exists()  # it has served


@pytest.mark.parametrize("stop", [{"crash_after": 5}, {"signal_at": 3}, {"signal_at": 5}])
def test_a_validation_in_mid_epoch_is_neither_lost_nor_repeated(tmp_path, monkeypatch, stop):
    options = [*OPTIONS, "trainer.val_check_interval=4", "callbacks.model_checkpoint.every_n_train_steps=4"]
    every, first, second = Losses(), Losses(**stop), Losses()
    metrics = trained(tmp_path / "whole", every, *options, monkeypatch=monkeypatch)
    with pytest.raises((RuntimeError, SystemExit)):
        trained(tmp_path / "stopped", first, *options, monkeypatch=monkeypatch)
    path = tmp_path / "stopped" / "checkpoints" / ("interrupted.ckpt" if "signal_at" in stop else "last.ckpt")
    assert load(path)["global_step"] == (6 if stop == {"signal_at": 5} else 4)
    again = trained(tmp_path / "stopped", second, f"ckpt_path={path}", monkeypatch=monkeypatch)
    assert list(every.validated) == [4, 8, 13, 17] and list(first.validated) == [4] and 4 not in second.validated
    assert {**first.validated, **second.validated} == every.validated
    assert {**first.seen, **second.seen} == every.seen and again == {k: metrics[k] for k in again}


def test_submitits_signal_saves_before_submitit_queues_the_job_again(tmp_path, monkeypatch):
    queued = []

    def requeue(number, frame):
        queued.append((number, load(tmp_path / "checkpoints" / "interrupted.ckpt")["global_step"]))
        raise SystemExit(-1)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        spy = Losses(signal_at=2)
        spy.number = signal.SIGUSR2
        with pytest.raises(SystemExit) as caught:
            trained(tmp_path, spy, *OPTIONS, monkeypatch=monkeypatch)
        assert caught.value.code == -1 and queued == [(signal.SIGUSR2, 3)]
        assert signal.getsignal(signal.SIGUSR2) is requeue  # given back
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_without_checkpoints_a_signal_ends_the_training_all_the_same(tmp_path, monkeypatch, capfd):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        trained(tmp_path, Losses(signal_at=2), *OPTIONS, "trainer.enable_checkpointing=false", monkeypatch=monkeypatch)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert "Stopped at step 3 (epoch 0). Nothing is saved: trainer.enable_checkpointing=false" in capfd.readouterr().out
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_second_ctrl_c_stops_at_once():
    callback = interrupt.SaveOnInterrupt("nowhere")
    callback._note(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        callback._note(signal.SIGINT, None)


def test_last_is_the_newest_run_of_the_task(tmp_path, capsys):
    options = [*DIGITS, "trainer.max_epochs=1", "test=false", f"paths.log_dir={tmp_path}", "callbacks.examples=null"]
    options += ["callbacks.learning_curves=null"]
    with pytest.raises(FileNotFoundError, match=r"ckpt_path=last: expected a run with checkpoints in .*digits, found"):
        run(tmp_path / "x", *options, "ckpt_path=last")
    for name in ("a", "b"):
        run(tmp_path / "digits" / "runs" / name, *options)
    folder = tmp_path / "digits" / "runs" / "b"
    run(folder, "ckpt_path=last", f"paths.log_dir={tmp_path}", "trainer.max_epochs=2", "test=false")
    assert f"ckpt_path=last: {folder}/checkpoints/last.ckpt" in capsys.readouterr().out
    assert load(folder / "checkpoints" / "last.ckpt")["epoch"] == 1
    assert train.config._output_dir("fit", "last", str(tmp_path), "digits", "now") == str(folder)
    assert train.config._output_dir("test", "best", str(tmp_path), "digits", "now") == str(folder / "test" / "now")
    with pytest.raises(FileNotFoundError, match="there are runs of digits"):
        run(tmp_path / "x", *options, "ckpt_path=best", "stage=test", "task_name=other")
    # auto: this run's own folder, where it has begun, else a new training
    assert train.locate("auto", tmp_path, "digits", folder) == str(folder / "checkpoints" / "last.ckpt")
    assert train.locate("auto", tmp_path, "digits", tmp_path / "new") is None
    # the same command once more, when all is done: nothing is trained, and no figure is lost
    done = json.loads((folder / "metrics.json").read_text())
    run(folder, *options, "trainer.max_epochs=2", "ckpt_path=auto")
    assert json.loads((folder / "metrics.json").read_text()) == done and "val/mcc" in done
    # a new training does not overwrite another one
    with pytest.raises(ValueError, match=r"holds the checkpoints of another training: go on with it \(ckpt_path="):
        run(folder, *options)
    # nor does an evaluation, which has a folder of its own
    kept = {p: p.read_bytes() for p in folder.glob("*.*") if p.is_file()}
    for stage in ("test", "export"):
        with pytest.raises(ValueError, match=f"holds a training, .* stage={stage} would overwrite"):
            run(folder, f"stage={stage}", f"ckpt_path={folder / 'checkpoints' / 'best.ckpt'}")
    assert kept == {p: p.read_bytes() for p in folder.glob("*.*") if p.is_file()}


def test_metrics_of_the_validation_are_all_of_the_best_epoch(tmp_path):
    """`metrics.json` had the monitored one of the best epoch beside the last epoch's others."""

    def check():
        last, best = (load(tmp_path / "checkpoints" / f"{name}.ckpt") for name in ("last", "best"))
        assert best["epoch"] < last["epoch"]
        (state,) = (v for k, v in last["callbacks"].items() if "LearningCurves" in k)
        row = next(row for row in state["history"] if row["epoch"] == best["epoch"])
        found = json.loads((tmp_path / "metrics.json").read_text())
        expected = {name: value for name, value in row.items() if name.startswith("val/")}
        assert len(expected) == 8 and {name: found[name] for name in expected} == pytest.approx(expected)
        assert found["train/loss"] == pytest.approx(state["history"][-1]["train/loss"])

    # A calibration error that rises again after the second epoch
    options = [*DIGITS, "task=constant_rate", "task.optimizer.lr=0.01", "task.scheduler.warmup=0", "test=false"]
    run(tmp_path, *options, "monitor=val/calibration_error", "trainer.max_epochs=3")
    check()
    run(tmp_path, f"ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}", "trainer.max_epochs=4")
    check()


def test_a_moved_run_knows_its_best(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    options = [*DIGITS, "trainer.max_epochs=1", "callbacks.learning_curves=null", "callbacks.examples=null"]
    metrics = run(old, *options, "callbacks.predictions=null")
    old.rename(new)
    path = new / "checkpoints" / "last.ckpt"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The dirpath has changed")
        assert run(new, f"ckpt_path={path}") == pytest.approx(metrics)  # nothing is left to train; its best is tested
    (state,) = (v for k, v in load(path)["callbacks"].items() if "Checkpoints" in k)
    assert state["dirpath"] == str(old / "checkpoints")
    callback = Checkpoints(dirpath=new / "checkpoints", filename="best", monitor="val/loss", save_last=True)
    callback.load_state_dict(state)
    best = str(new / "checkpoints" / "best.ckpt")
    assert callback.best_model_path == callback.kth_best_model_path == best and callback.last_model_path == str(path)
    assert callback.best_k_models == {best: callback.best_model_score} and callback.best_metrics
    # a state that came without its files
    callback = Checkpoints(dirpath=tmp_path / "other", filename="best", monitor="val/loss", save_last=True)
    callback.load_state_dict(state)
    assert callback.best_model_score is None and not callback.best_k_models and not callback.best_metrics
    assert callback.best_model_path == callback.kth_best_model_path == callback.last_model_path == ""


def test_a_resumed_training_that_is_killed_has_no_figures(tmp_path, monkeypatch):
    """Those of its first part are not of the `best.ckpt` that it has overwritten, nor of its configuration; those that
    fail before they begin change neither."""
    options = [*DIGITS, "callbacks.learning_curves=null", "callbacks.examples=null", "trainer.max_epochs=1"]
    run(tmp_path, *options)
    names = ("metrics.json", "predictions.parquet", "plots/confusion_matrix_test.png")
    done = [(tmp_path / name).read_bytes() for name in names]
    go_on = f"ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}"
    with pytest.raises(InstantiationException, match=r"data\.val_fraction"):
        run(tmp_path, go_on, "trainer.max_epochs=2", "data.val_fraction=2")
    assert [r.config["trainer.max_epochs"] for r in find_runs([tmp_path])[0]] == [1]
    with pytest.raises(RuntimeError, match="crash"):
        trained(tmp_path, Losses(crash_after=8), go_on, "trainer.max_epochs=2", monkeypatch=monkeypatch)
    assert not any((tmp_path / name).exists() for name in names)
    best = tmp_path / "checkpoints" / "best.ckpt"
    found, _ = find_metrics(best, load(best))
    assert not found
    with pytest.raises(ValueError, match="1 not finished"):
        find_runs([tmp_path])
    aside = [next(tmp_path.glob("_2*.".join(name.split(".")))) for name in names]
    assert [path.read_bytes() for path in aside] == done
    run(tmp_path, go_on, "trainer.max_epochs=2")
    assert all((tmp_path / name).exists() for name in names)
    assert [r.config["trainer.max_epochs"] for r in find_runs([tmp_path])[0]] == [2]


def test_two_runs_in_one_folder_are_one_clear_error(tmp_path):
    with train.claimed(tmp_path, fresh=True), pytest.raises(ValueError, match=r"another run is writing to .*process"):
        run(tmp_path, *DIGITS)
    with train.claimed(tmp_path, fresh=True):
        pass  # it was given back


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel refuses to write more, as a full disk does
    try:
        with pytest.raises(OSError, match=r"could not write checkpoint .*last\.ckpt: File too large.*intact: .*last"):
            writer.save_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load(path) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    writer.save_checkpoint({"step": 3}, path)
    assert load(path) == {"step": 3}


def test_a_full_disk_ends_a_training_with_one_message(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bimamba.atomic.os.fsync", full)
    monkeypatch.setattr("bimamba.callbacks.learning_curves.save_figure", full)  # nor is there room for a picture
    with pytest.raises(SystemExit) as caught, train.config.clear_errors():
        run(tmp_path, *DIGITS, "trainer.max_epochs=1")
    assert "No space left on device" in str(caught.value) and "No earlier checkpoint was there" in str(caught.value)


def test_what_is_killed_while_saving_leaves_the_last_good_checkpoint(tmp_path):
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)
    child = os.fork()
    if child == 0:

        class Bomb:
            def __reduce__(self):
                os.kill(os.getpid(), signal.SIGKILL)

        writer.save_checkpoint({"weights": torch.zeros(1000), "last": Bomb()}, path)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert load(path) == {"step": 1}
    writer.save_checkpoint({"step": 2}, path)  # what the kill left is in nobody's way
    assert load(path) == {"step": 2} and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("crash", [9, 13])  # at the end of an epoch, and in mid-epoch
def test_a_rate_that_follows_the_validation_falls_when_it_would_have(tmp_path, monkeypatch, crash):
    """Lightning (2.6) steps such a schedule after the epoch's checkpoints, and not in a resumed epoch."""
    options = ["task=plateau", "task.scheduler.patience=0", "task.scheduler.threshold=0.9", "task.scheduler.warmup=0"]
    options += [*OPTIONS, "trainer.max_epochs=3"]
    trained(tmp_path / "whole", Losses(), *options, monkeypatch=monkeypatch)
    with pytest.raises(RuntimeError, match="crash"):
        trained(tmp_path / "cut", Losses(crash_after=crash + 1), *options, monkeypatch=monkeypatch)
    path = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    trained(tmp_path / "cut", Losses(), f"ckpt_path={path}", monkeypatch=monkeypatch)
    whole, cut = load(tmp_path / "whole" / "checkpoints" / "last.ckpt"), load(path)
    rates = [[g["lr"] for g in c["optimizer_states"][0]["param_groups"]] for c in (whole, cut)]
    assert rates[0] == rates[1] and rates[0][0] < 0.002  # fell at least once
    same_weights(whole, cut)
