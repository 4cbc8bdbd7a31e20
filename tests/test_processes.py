"""Two processes (gloo, CPU): the figures and the predictions of one process, in one folder."""

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from runs import DIGITS, ROOT, run


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(tmp_path):
    run(tmp_path, *DIGITS, "trainer.max_epochs=1", "task.optimizer.lr=0.01")  # 359 test rows: odd
    checkpoint = tmp_path / "checkpoints" / "best.ckpt"
    command = ["stage=test", f"ckpt_path={checkpoint}", "trainer=ddp_sim", "trainer.enable_progress_bar=false"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "train.py", *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "test").iterdir()
    one, two = (json.loads((f / "metrics.json").read_text()) for f in (tmp_path, folder))
    for name in ("accuracy", "mcc", "f1", "auroc", "average_precision", "calibration_error", "loss"):
        assert two[f"test/{name}"] == pytest.approx(one[f"test/{name}"], abs=1e-6), name
    tables = [pq.read_table(f / "predictions.parquet").to_pylist() for f in (tmp_path, folder)]
    assert [r["id"] for r in tables[1]] == [r["id"] for r in tables[0]]
    assert [r["label"] for r in tables[1]] == [r["label"] for r in tables[0]]


@pytest.mark.slow
def test_two_processes_train_into_one_folder(tmp_path):
    options = [*DIGITS, "trainer=ddp_sim", "trainer.max_epochs=2", f"paths.log_dir={tmp_path}", "data.batch_size=64"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "train.py", *options], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "digits" / "runs").iterdir()
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert pq.read_table(folder / "predictions.parquet").num_rows == 359


LATE = """import os, time
if os.environ.get("RANK") == "1":
    time.sleep(2)
"""


def launched(*overrides, folder, launcher=(sys.executable,)):
    """Metrics and folder of a run in processes of its own; the second one of torchrun begins in a later second."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(LATE)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*launcher, "train.py", *DIGITS, "data.augment.crop_padding=0", *overrides, f"paths.log_dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (run_folder,) = (folder / "digits" / "runs").iterdir()
    return json.loads((run_folder / "metrics.json").read_text()), run_folder


@pytest.mark.slow
def test_ddp_fsdp_and_torchrun_learn_what_one_process_learns(tmp_path):
    options = ["trainer.max_epochs=2", "data.drop_last=true", "task.optimizer.lr=0.01"]
    one = run(tmp_path / "one", *DIGITS, "data.augment.crop_padding=0", *options)  # batches of 256, as 2 times 128
    two = [*options, "data.batch_size=128", "trainer.accelerator=cpu", "trainer.devices=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    runs = {
        "ddp": launched("trainer=ddp", *two, folder=tmp_path / "ddp"),
        "fsdp": launched("trainer=fsdp", *two, folder=tmp_path / "fsdp"),
        "torchrun": launched("trainer=ddp", *two, folder=tmp_path / "torchrun", launcher=torchrun),
    }
    for name, (metrics, folder) in runs.items():
        for key in ("train/loss", "val/loss", "test/loss"):
            assert metrics[key] == pytest.approx(one[key], rel=1e-3), (name, key)
        table = pq.read_table(folder / "predictions.parquet")
        assert table.num_rows == len(set(table.column("id").to_pylist())) == 359, name
    # a checkpoint of shards is as that of one process: it is resumed by one
    last = runs["fsdp"][1] / "checkpoints" / "last.ckpt"
    alone = ["trainer=cpu", "trainer.max_epochs=3", "data.batch_size=256", "test=false"]
    resumed = run(runs["fsdp"][1], f"ckpt_path={last}", *alone)
    assert resumed["train/loss"] < one["train/loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("jobs", "whole"),
    [
        ("trainer=cpu,ddp_sim", "01"),
        ("trainer=ddp_sim,cpu,ddp_sim", "02"),
        ("trainer=ddp_sim trainer.devices=1,2", "01"),
        ("trainer=ddp_sim trainer.devices=2,1", "0"),
    ],
)
def test_a_sweep_of_one_and_of_several_processes(tmp_path, jobs, whole):
    """Each job is run once: the processes that a later job starts leave the earlier ones alone. Once there are several
    processes, jobs of one are refused."""
    options = [*DIGITS, "trainer.max_epochs=1", "trainer.limit_train_batches=2", "test=false", "logger=none"]
    command = [sys.executable, "train.py", "-m", *options, *jobs.split(), f"paths.log_dir={tmp_path}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    (sweep,) = (tmp_path / "digits" / "multiruns").iterdir()
    assert [f.parent.name for f in sorted(sweep.glob("*/metrics.json"))] == list(whole), done.stdout + done.stderr
    for number in whole:  # nobody has written there since
        times = [(sweep / number / name).stat().st_mtime for name in ("metrics.json", "checkpoints/last.ckpt")]
        assert times[0] >= times[1]
    assert (done.returncode == 0) == (len(whole) == len(jobs.split("=")[-1].split(",")))
    assert done.returncode == 0 or "has 2 processes by now" in done.stdout + done.stderr
