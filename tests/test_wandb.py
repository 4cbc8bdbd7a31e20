"""What an offline W&B run file contains, read back record by record."""

import json
from pathlib import Path

import pytest
from runs import DIGITS, run, train
from wandb_files import finished, history

from bimamba.loggers import SECTIONS, WandbLogger, finish_wandb, run_name, summary_of

pytest.importorskip("wandb.proto.wandb_internal_pb2")


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A short run logged offline: its folder, metrics and records."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("NETRC", str(folder / "none"))
        patch.setenv("HOME", str(folder))  # nobody is logged in
        options = ["logger=wandb", "logger.wandb.log_model=true", "trainer.max_epochs=2", "trainer.log_every_n_steps=2"]
        metrics = run(folder, *DIGITS, *options, "callbacks.throughput.skip_steps=2", "data.batch_size=128")
        finish_wandb()
    return folder, metrics, finished(folder)


def test_the_whole_resolved_configuration_is_there(offline):
    config = {}
    for record in offline[2]:
        for update in (*record.config.update, *record.run.config.update):
            config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    assert config["model"]["d_model"] == 16 and config["data"]["seed"] == 0 and config["seed"] == 0
    assert config["task"]["optimizer"]["_target_"] == "torch.optim.AdamW"
    assert "${" not in json.dumps({k: v for k, v in config.items() if k != "_wandb"})


def test_metrics_rates_and_media_are_there(offline):
    values = history(offline[2])
    for name in (
        "train/loss",
        "train/grad_norm",
        "val/accuracy",
        "val/mcc",
        "test/auroc",
        "performance/samples_per_second",
        "performance/tokens_per_second",
        "trainer/global_step",
    ):
        assert name in values, f"{name} not in {sorted(values)}"
    assert any(name.startswith("train/lr") for name in values)
    assert values["test/accuracy"][-1] == pytest.approx(offline[1]["test/accuracy"])
    for name in ("val/confusion_matrix", "test/confusion_matrix", "samples/val", "samples/test", "test/reliability"):
        assert values[f"{name}/_type"][-1] == "images/separated", name
    assert len(values["val/accuracy"]) == 2
    files = list(offline[0].glob("wandb/offline-run-*/files/media/images/**/*.png"))
    assert len(files) >= 5


def test_every_metric_has_a_section_an_axis_and_its_best_value_as_summary(offline):
    logged = {name for name in history(offline[2]) if not name.startswith("_")}
    assert {name.split("/")[0] for name in logged} - {"epoch", "trainer"} <= set(SECTIONS)
    assert {"train", "val", "test", "performance", "model", "samples"} <= {name.split("/")[0] for name in logged}
    defined = [r.metric for r in offline[2] if r.HasField("metric")]
    globs = {m.glob_name: m.step_metric for m in defined if m.glob_name}
    assert all(globs[f"{section}/*"] == "trainer/global_step" for section in SECTIONS)
    flags = {m.name: {f.name for f, v in m.summary.ListFields() if v} for m in defined if m.name}
    assert all(m.step_metric == "trainer/global_step" for m in defined if m.name.startswith("val/"))
    for name, best in (("val/loss", "min"), ("val/accuracy", "max"), ("val/calibration_error", "min")):
        assert flags[name] == {best}, name
    assert flags["train/loss"] == {"min"} and flags["performance/samples_per_second"] == {"mean"}
    assert "test/accuracy" not in flags  # it is measured once
    hidden = [m.name for m in defined if m.options.hidden]
    assert hidden == ["epoch"]


def test_every_validation_metric_is_known_to_be_better_up_or_down():
    """A metric that nobody thought of would get the wrong summary."""
    from bimamba.spec import DataSpec
    from bimamba.tasks.metrics import make_metrics

    for problem in ("multiclass", "binary", "multilabel", "regression"):
        spec = DataSpec("sequence", problem, ("a", "b"), alphabet="ACGTN", max_length=4)
        up = {n.split("/")[1] for n in make_metrics(spec, "val/", 15, None) if summary_of(n) == "max"}
        known = "accuracy balanced_accuracy sensitivity specificity f1 f1_macro mcc auroc average_precision exact_match"
        assert up <= {*known.split(), "r2", "pearson", "spearman"}, up


def test_the_run_is_named_and_grouped_after_its_experiment(offline):
    (run_record,) = [r.run for r in offline[2] if r.HasField("run")]
    assert run_record.run_group == "digits" and run_record.display_name == "digits"  # in-process: no command line
    assert run_record.job_type == "fit" and list(run_record.tags) == ["digits", "image"]
    typed = ["seed=3", "++model.depth=2", "experiment=digits", "logger.wandb.mode=offline", "paths.log_dir=/x"]
    assert run_name("digits", "fit", typed) == "digits seed=3 model.depth=2"
    assert run_name("digits", "test", ["stage=test", "ckpt_path=a.ckpt"]) == "digits test"
    assert run_name(None, None, []) is None
    assert len(run_name("digits", "fit", [f"data.path={'x' * 200}"])) == 128


def test_the_code_is_kept(offline):
    (code,) = [a for a in artifacts(offline[2]) if a.type == "code"]
    paths = {entry.path for entry in code.manifest.contents}
    assert {"train.py", "bimamba/loggers.py", "configs/train.yaml"} <= paths
    assert not any(p.startswith(("logs", "data/", "tests", ".")) for p in paths)


def artifacts(found):
    sent = [r.request.log_artifact.artifact for r in found if r.request.HasField("log_artifact")]
    return sent + [r.artifact for r in found if r.HasField("artifact")]


def test_nothing_that_was_logged_is_missing_offline(offline):
    """Every number of the run's CSV-like history and every picture it refers to lies in the offline folder."""
    values = history(offline[2])
    (files,) = offline[0].glob("wandb/offline-run-*/files")
    shown = [name.removesuffix("/filenames") for name in values if name.endswith("/filenames")]
    assert len(shown) >= 5
    for name in shown:
        for stored in values[f"{name}/filenames"]:
            assert all((files / path).stat().st_size > 0 for path in stored), name
    for name, value in offline[1].items():
        if name.startswith("test/"):
            assert values[name][-1] == pytest.approx(value), name
    code = [a for a in artifacts(offline[2]) if a.type == "code"]
    assert all(Path(e.local_path).is_file() for a in code for e in a.manifest.contents)


def test_the_best_checkpoint_is_an_artifact_even_offline(offline):
    models = [a for a in artifacts(offline[2]) if a.type == "model"]
    assert any("best" in a.aliases for a in models)


def test_nobody_logged_in_is_offline_and_the_run_is_found_again(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    first = WandbLogger(str(tmp_path))
    assert first.mode == "offline"
    assert WandbLogger(str(tmp_path)).version == first.version  # the same folder, the same run
    assert WandbLogger(str(tmp_path / "other")).version != first.version
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert WandbLogger(str(tmp_path)).mode == "online"
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert WandbLogger(str(tmp_path)).mode == "offline"
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.delenv("WANDB_MODE")
    import wandb

    # what `wandb login` of this and of older versions writes, a server of one's own, and another host's key
    own = wandb.Settings().base_url.removeprefix("https://")
    for host, mode in ((own, "online"), ("api.wandb.ai", "online"), ("example.com", "offline")):
        (tmp_path / ".netrc").write_text(f"machine {host} login user password secret\n")
        assert WandbLogger(str(tmp_path)).mode == mode, host
    monkeypatch.setenv("WANDB_BASE_URL", "https://example.com")
    assert WandbLogger(str(tmp_path)).mode == "online"
    with pytest.raises(ValueError, match="expected one of online"):
        WandbLogger(str(tmp_path), mode="offlin")


def test_jobs_of_a_sweep_are_runs_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for job in ("0", "1"):
        run(tmp_path / job, *DIGITS, "logger=wandb", "trainer.max_epochs=1", "test=false", f"seed={job}")
        train.finish_wandb()  # as main() does after each job
    ids = [{r.run.run_id for r in finished(tmp_path / job) if r.HasField("run")} for job in ("0", "1")]
    assert all(len(i) == 1 for i in ids) and ids[0] != ids[1]
