"""What an offline W&B run file contains, read back record by record."""

import json
import struct
import time
from pathlib import Path

import pytest
from runs import DIGITS, run, train

from bimamba.loggers import WandbLogger, finish_wandb

wandb_pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")

BLOCK = 32768


def records(path: Path):
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format (crc, length, type; 32 kB blocks)."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no room for a header: the block's rest is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_pb.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def finished(folder: Path) -> list:
    """All records of a folder's one run. W&B writes them in another process, which may be a moment behind."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    found = list(records(path))
    while not any(r.HasField("exit") for r in found):
        assert time.monotonic() < deadline, f"{path} has no end after {len(found)} records"
        time.sleep(0.2)
        found = list(records(path))
    return found


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
    values: dict[str, list] = {}
    for record in offline[2]:
        for item in record.history.item:
            values.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
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
    for name in ("confusion_matrix/val", "confusion_matrix/test", "samples/val", "samples/test", "reliability/test"):
        assert values[f"{name}/_type"][-1] == "images/separated", name
    assert len(values["val/accuracy"]) == 2
    files = list(offline[0].glob("wandb/offline-run-*/files/media/images/**/*.png"))
    assert len(files) >= 5


def test_the_best_checkpoint_is_an_artifact_even_offline(offline):
    artifacts = [r.request.log_artifact.artifact for r in offline[2] if r.request.HasField("log_artifact")]
    artifacts += [r.artifact for r in offline[2] if r.HasField("artifact")]
    models = [a for a in artifacts if a.type == "model"]
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
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
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
