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
