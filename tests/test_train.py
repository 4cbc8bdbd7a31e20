"""train.py end to end on the digits: fit, resume, test and predict from the checkpoint alone, and every bad input."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from PIL import Image
from runs import DIGITS, ROOT, composed, load, run, train

from bimamba.checkpoint import read_checkpoint, weights_digest
from bimamba.overrides import with_checkpoint


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """One short training with its folder; read only."""
    folder = tmp_path_factory.mktemp("fitted")
    metrics = run(folder, *DIGITS, "trainer.max_epochs=2", "task.optimizer.lr=0.01", choices={"experiment": "digits"})
    return folder, metrics


def best(fitted):
    return f"ckpt_path={fitted[0] / 'checkpoints' / 'best.ckpt'}"


def last(fitted):
    return f"ckpt_path={fitted[0] / 'checkpoints' / 'last.ckpt'}"


def test_a_run_folder_holds_everything(fitted):
    folder, metrics = fitted
    for name in (
        "config.yaml",
        "spec.json",
        "metrics.json",
        "predictions.parquet",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "csv/version_0/metrics.csv",
        "plots/learning_curves.png",
        "plots/confusion_matrix_val.png",
        "plots/confusion_matrix_test.png",
        "plots/reliability_test.png",
        "plots/examples_test.png",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert json.loads((folder / "metrics.json").read_text()) == pytest.approx(metrics)
    assert json.loads((folder / "spec.json").read_text())["class_names"] == list("0123456789")
    with Image.open(folder / "plots" / "confusion_matrix_test.png") as image:
        assert np.asarray(image.convert("RGB")).std() > 10  # something is drawn
    logged = set(next(csv.reader((folder / "csv/version_0/metrics.csv").open())))
    assert {"train/loss", "val/mcc", "test/auroc", "train/grad_norm", "performance/samples_per_second"} <= logged
    assert any(name.startswith("train/lr") for name in logged)


def test_predictions_agree_with_the_metrics(fitted):
    folder, metrics = fitted
    table = pq.read_table(folder / "predictions.parquet")
    assert table.column_names[:3] == ["id", "prediction", "label"]
    rows = table.to_pylist()
    assert len(rows) == 359 and len({r["id"] for r in rows}) == 359
    accuracy = np.mean([r["prediction"] == r["label"] for r in rows])
    assert accuracy == pytest.approx(metrics["test/accuracy"], abs=1e-6)
    assert sum(rows[0][f"probability_{c}"] for c in "0123456789") == pytest.approx(1, abs=1e-5)


def test_a_checkpoint_carries_its_configuration_in_plain_containers(fitted):
    saved = load(fitted[0] / "checkpoints" / "best.ckpt")
    assert saved["config"]["trainer"]["max_epochs"] == 2 and saved["config"]["data"]["seed"] == 0
    assert saved["recipe"]["data"]["seed"] == "${seed}"
    assert saved["spec"]["height"] == 8 and saved["choices"] == {"experiment": "digits"}


def test_testing_repeats_no_override_and_gives_the_same_figures(fitted, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the checkpoint was trained on other rows")
        metrics = run(tmp_path, "stage=test", best(fitted), "extras.print_config=false", "seed=5")  # the splits stay
    for name in ("test/accuracy", "test/loss", "test/mcc", "test/auroc"):
        assert metrics[name] == pytest.approx(fitted[1][name], abs=1e-6), name
    assert (tmp_path / "predictions.parquet").is_file()
    assert (tmp_path / "plots" / "confusion_matrix_test.png").is_file()
    weights = weights_digest(load(fitted[0] / "checkpoints" / "best.ckpt"))
    evaluated = json.loads((tmp_path / "evaluated.json").read_text())
    assert evaluated["weights"] == weights and evaluated["metrics"] == metrics
    assert evaluated["config"]["stage"] == "test"
    assert not (tmp_path / "checkpoints").exists()


def test_testing_on_other_rows_of_the_same_data_is_told(fitted, tmp_path):
    with pytest.warns(UserWarning, match=r"may be among those tested \(data\.seed=5; the old .* data\.seed=0\)"):
        run(tmp_path, "stage=test", best(fitted), "data.seed=5", "callbacks=none", "trainer.limit_test_batches=1")


def test_predicting_needs_no_training_data(fitted, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), 60 * i, dtype=np.uint8)).save(images / f"{i}.png")
    metrics = run(tmp_path / "out", "stage=predict", best(fitted), f"data.predict={images}")
    assert metrics == {}  # nobody knows the labels
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert table.num_rows == 3 and "label" not in table.column_names


def test_command_line_adds_to_the_checkpoint(fitted, tmp_path):
    checkpoint = read_checkpoint(fitted[0] / "checkpoints" / "best.ckpt")
    typed = ["stage=test", best(fitted), "++data.batch_size=7", "trainer=ddp_sim", "logger=none", "++seed=3"]
    typed += ["hydra=default", "hydra.job.chdir=false"]  # of the launch, not of the run
    given = composed(tmp_path, *typed)
    with train.hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = with_checkpoint(given, checkpoint, typed)
    assert cfg.data.batch_size == 7 and cfg.seed == 3
    assert cfg.data.seed == 0  # or rows of the training would be tested
    assert cfg.model.d_model == 16 and cfg.model.embedding.patch_size == 4  # the checkpoint's
    assert cfg.trainer.devices == 2 and cfg.trainer.max_epochs == 10  # the group's, not that of the default experiment
    assert not cfg.logger
    assert cfg.paths.output_dir == str(tmp_path)


def test_another_monitor_on_top_of_a_checkpoint_brings_its_own_mode(fitted, tmp_path):
    checkpoint = read_checkpoint(fitted[0] / "checkpoints" / "last.ckpt")
    assert checkpoint["config"]["monitor_mode"] == "min"  # settled before anything was saved
    typed = [last(fitted), "monitor=val/accuracy"]
    given = composed(tmp_path, *typed)
    with train.hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = with_checkpoint(given, checkpoint, typed)
    train.config.settle_modes(cfg)
    assert cfg.monitor_mode == cfg.callbacks.model_checkpoint.mode == "max"


def test_resuming_goes_on_where_it_stopped_in_the_same_folder(tmp_path):
    run(tmp_path, *DIGITS, "trainer.max_epochs=1", "test=false")
    first = load(tmp_path / "checkpoints" / "last.ckpt")
    run(tmp_path, f"ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}", "trainer.max_epochs=3", "test=false")
    second = load(tmp_path / "checkpoints" / "last.ckpt")
    assert (first["epoch"], second["epoch"]) == (0, 2)
    assert second["global_step"] == 3 * first["global_step"]
    steps = {int(s["step"]) for s in second["optimizer_states"][0]["state"].values()}
    assert steps == {second["global_step"]}  # Adam went on counting
    assert second["config"]["model"]["d_model"] == 16
    (state,) = (v for k, v in second["callbacks"].items() if "LearningCurves" in k)
    assert [row["epoch"] for row in state["history"]] == [0, 1, 2]
    assert len(list(tmp_path.glob("config*.yaml"))) == 2  # the first one is kept


def test_resuming_with_another_rate_is_refused_for_it_would_do_nothing(fitted, tmp_path):
    with pytest.raises(ValueError, match=r"task\.optimizer\.lr=0\.05: a resumed training goes on .*\(lr=0\.01\)"):
        run(tmp_path, last(fitted), "task.optimizer.lr=0.05")
    with pytest.raises(ValueError, match=r"task\.optimizer\.amsgrad=True: .*\(amsgrad=None\)"):
        run(tmp_path, last(fitted), "+task.optimizer.amsgrad=true")
    with pytest.raises(ValueError, match=r"task\.layer_decay=0\.5: a resumed training goes on"):
        run(tmp_path, last(fitted), "task.layer_decay=0.5")
    checkpoint = read_checkpoint(fitted[0] / "checkpoints" / "last.ckpt")
    typed = [last(fitted), "++task.optimizer.lr=0.01"]  # the whole command once more, by a scheduler
    given = composed(tmp_path, *typed)
    with train.hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        assert with_checkpoint(given, checkpoint, typed).task.optimizer.lr == 0.01


def test_resuming_with_another_schedule_is_refused_for_it_would_do_nothing(fitted, tmp_path):
    def resumed(checkpoint, *typed):
        typed = train.soften([last(fitted), *typed])
        given = composed(tmp_path, *typed)
        with train.hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return with_checkpoint(given, checkpoint, typed)

    checkpoint = read_checkpoint(fitted[0] / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=r"task\.scheduler\._target_=bimamba\.optim\.plateau: .*optim\.cosine\)"):
        resumed(checkpoint, "task.scheduler._target_=bimamba.optim.plateau")
    assert resumed(checkpoint, "task.scheduler.final_ratio=0.1").task.scheduler.final_ratio == 0.1  # of the step alone
    cfg = composed(tmp_path, *DIGITS, "task=plateau", "monitor=val/mcc", "task.scheduler.monitor=val/loss")
    train.config.settle_modes(cfg)
    checkpoint |= {"recipe": train.config.recipe(cfg)}
    for typed in ("task.scheduler.patience=2", "task.scheduler.monitor=val/mcc"):
        with pytest.raises(ValueError, match=rf"{typed}: a resumed training goes on with its schedule"):
            resumed(checkpoint, typed)
    # the whole command once more, by a scheduler
    resumed(checkpoint, "monitor=val/mcc", "task.scheduler.monitor=val/loss")


def test_other_batches_in_mid_epoch_are_told(fitted, tmp_path):
    checkpoint, typed = read_checkpoint(fitted[0] / "checkpoints" / "last.ckpt"), [last(fitted), "++data.batch_size=64"]
    given = composed(tmp_path, *typed)
    with train.hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with_checkpoint(given, checkpoint, typed)  # at an epoch's end all rows are done
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress |= {"is_last_batch": False, "current": {"completed": 3}}
        with pytest.warns(UserWarning, match=r"data\.batch_size=64: .* after 3 batches of 256 rows.* has rows twice"):
            with_checkpoint(given, checkpoint, typed)


def test_where_runs_write(fitted, tmp_path):
    _output_dir = train.config._output_dir
    folder, checkpoint = fitted[0], str(fitted[0] / "checkpoints" / "best.ckpt")
    assert _output_dir("fit", None, "logs", "digits", "now") == "logs/digits/runs/now"
    assert _output_dir("fit", checkpoint, "logs", "digits", "now") == str(folder)
    assert _output_dir("test", checkpoint, "logs", "digits", "now") == str(folder / "test" / "now")
    alone = str(tmp_path / "downloaded.ckpt")
    assert _output_dir("test", alone, "logs", "digits", "now") == "logs/test/runs/now"
    assert _output_dir("fit", alone, "logs", "digits", "now") == "logs/digits/runs/now"


def test_commands_that_are_shown_can_be_typed(tmp_path, capsys):
    best = tmp_path / "my run" / "checkpoints" / "best.ckpt"
    best.parent.mkdir(parents=True)
    best.touch()
    train.config.show_results({}, tmp_path / "my run", "fit")
    *_, typed = shlex.split(capsys.readouterr().out)
    given = composed(tmp_path, typed)
    assert given.ckpt_path == str(best)


def test_fast_dev_run_leaves_no_checkpoint(tmp_path):
    metrics = run(tmp_path, *DIGITS, "trainer.fast_dev_run=true")
    assert "test/accuracy" in metrics and not list(tmp_path.rglob("*.ckpt"))


def test_switches_of_the_trainer_need_no_other_callbacks(tmp_path):
    metrics = run(tmp_path, *DIGITS, "trainer.enable_checkpointing=false", "trainer.max_epochs=1", "logger=none")
    assert "test/accuracy" in metrics  # of the last weights


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path, precision):
    metrics = run(tmp_path, *DIGITS, f"trainer.precision={precision}", "trainer.fast_dev_run=true")
    assert 1.5 < metrics["train/loss"] < 3.5 and 1.5 < metrics["test/loss"] < 3.5


def test_an_end_by_the_clock(tmp_path):
    metrics = run(tmp_path, *DIGITS, "trainer.max_epochs=99999", "trainer.max_time={seconds: 1}")
    assert "test/accuracy" in metrics and (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_seed_zero_is_a_seed_and_null_is_none(tmp_path):
    options = [*DIGITS, "trainer.fast_dev_run=true"]
    a, b = (run(tmp_path / n, *options, "seed=0")["train/loss"] for n in "ab")
    c, d = (run(tmp_path / n, *options, "seed=null", "data.seed=0")["train/loss"] for n in "cd")
    assert a == b and c != d


# --------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=tset"], "stage: expected one of fit, test, predict"),
        (["stage=test"], "needs a checkpoint"),
        (["stage=predict", "ckpt_path=x.ckpt"], "data.predict=FILE"),
        (["stage=test", "ckpt_path=nowhere/x.ckpt"], "expected a checkpoint file, got nowhere/x.ckpt"),
        (["monitor=test/accuracy"], "must not choose the model"),
        (["seed=0", "task.label_smoothing=2"], "label_smoothing"),
        (["task.scheduler.warmup=-3"], "warmup"),
        (
            ["data.val_fraction=0", "callbacks=early_stopping"],
            "callbacks.early_stopping.monitor=val/loss: expected a val",
        ),
        (["trainer.limit_val_batches=0", "task=plateau"], "task.scheduler.monitor=val/loss: expected a validation"),
        (["callbacks.model_checkpoint.save_top_k=3"], "the last one would overwrite the best"),
        (["logger=wandb", "logger.wandb.mode=online"], "logger.wandb.mode=offline"),
    ],
)
def test_bad_values(tmp_path, monkeypatch, overrides, message):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))  # nobody is logged in
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit) as caught, train.config.clear_errors():
        run(tmp_path, *DIGITS, *overrides)
    assert message in str(caught.value) and str(caught.value).startswith("error: ")


def test_a_folder_that_cannot_be_made_is_one_message_with_its_key(tmp_path, monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # whatever stands there afterwards is taken back
    (tmp_path / "logs").touch()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", [f"paths.log_dir={tmp_path / 'logs'}"], return_hydra_config=True)
    folder = instantiate(cfg.hydra.callbacks.output_folder)
    for begins, key in ((folder.on_run_start, "run"), (folder.on_multirun_start, "sweep")):
        with pytest.raises(SystemExit, match=rf"^error: hydra\.{key}\.dir .*paths\.log_dir.*Not a directory"):
            begins(config=cfg)
    with pytest.raises(ValueError, match=r"paths\.output_dir: expected a folder .*Not a directory"):
        train.claimed(tmp_path / "logs" / "run", fresh=True).__enter__()


def test_clear_errors_are_one_message(capsys):
    with pytest.raises(SystemExit) as caught, train.config.clear_errors():
        raise ValueError("expected a, got b")
    assert str(caught.value).startswith("error: expected a, got b\n")


def test_an_error_in_one_job_of_a_sweep_leaves_the_others_their_turn(capsys):
    from hydra.core.utils import JobReturn, JobStatus

    def job():
        with train.config.clear_errors(sweeping=True):
            raise FloatingPointError("not finite at step 3")

    with pytest.raises(Exception, match="not finite at step 3") as caught:  # what Hydra catches; not SystemExit
        job()
    assert capsys.readouterr().err.startswith("error: not finite at step 3\n")  # said at once, not after the last job
    failed = JobReturn(status=JobStatus.FAILED)
    failed.return_value = caught.value
    with pytest.raises(train.config.JobFailed):  # and the sweep fails in the end
        _ = failed.return_value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batchsize=8", "did you mean data.batch_size"),
        ("experiment=promoters", "brings its own configuration"),
        ("model.d_model=24", "of another model"),
        ("model=tiny", "of another model"),
        ("data.predict=/nowhere/at/all", "/nowhere/at/all"),
    ],
)
def test_bad_additions_to_a_checkpoint(fitted, tmp_path, override, message):
    stage = "predict" if "predict" in override else "test"
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run(tmp_path, f"stage={stage}", best(fitted), override, "extras.print_config=false")
    assert message in str(caught.value)


def test_other_class_names_are_refused(fitted, tmp_path):
    names = "[a,b,c,d,e,f,g,h,i,j]"
    with pytest.raises(ValueError, match="class names differ") as caught:
        run(tmp_path, "stage=test", best(fitted), f"data.class_names={names}", "extras.print_config=false")
    assert "'0'" in str(caught.value) and "'a'" in str(caught.value)


def test_optimized_metric():
    assert train.config.optimized({"val/mcc": 0.5}, "val/mcc") == 0.5
    assert train.config.optimized({"val/mcc": 0.5}, None) is None
    with pytest.raises(ValueError, match="there are val/mcc"):
        train.config.optimized({"val/mcc": 0.5}, "val/auc")


# ------------------------------------------------------------------------------------------------ in a fresh process


def launch(*arguments, **options):
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def test_interrupt_leaves_a_checkpoint_to_go_on_from(tmp_path):
    process = launch(*DIGITS, "trainer.max_epochs=100000", f"paths.log_dir={tmp_path}")
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob("digits/runs/*/checkpoints/last.ckpt"))):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    saved = found[0].with_name("interrupted.ckpt")
    assert str(saved) in said and f"python train.py ckpt_path={saved}" in said
    step = load(saved)["global_step"]
    assert step > 0
    # Resumed by the command that was printed, it ends at the epoch it is told to.
    epoch = load(saved)["epoch"] + 2
    folder = saved.parents[1]
    run(folder, f"ckpt_path={saved}", f"trainer.max_epochs={epoch}", "test=false", "extras.print_config=false")
    assert load(folder / "checkpoints" / "last.ckpt")["global_step"] > step
    assert not saved.exists()  # it has served


def test_a_user_error_in_a_fresh_process_is_one_message(tmp_path):
    process = launch("experiment=promoters", f"paths.log_dir={tmp_path}")
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "Traceback" not in said
    assert "error: data.path is not set" in said
