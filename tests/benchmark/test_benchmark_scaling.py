"""The benchmark of several devices: what it runs, compares and checks; its commands here in forked processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from processes import two_processes
from runs import TINY, run, train

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmark"))
import benchmark_scaling


class Forked(benchmark_scaling.Host):
    """Instead of `python train.py`, which imports for ten seconds: this process, or two copies of it."""

    def run(self, runs, alone=False):
        for one in runs:
            stage = next((o.split("=")[1] for o in one.overrides if o.startswith("stage=")), "fit")
            one.folder = one.folder if one.folder != Path() else self.work / one.name
            made = [f for f in one.folder.glob("*/runs/*") if f.is_dir()]
            folder = made[0] if made else one.folder / "dna_pretrain" / "runs" / "now"
            folder = folder if stage == "fit" else folder / stage / "now"
            options = [*one.overrides, f"trainer.devices={one.devices}", "trainer.accelerator=cpu"]
            options += ["trainer.enable_model_summary=false", "callbacks.examples=null"]
            if one.devices == 1:
                run(folder, *options)
                train.finish_wandb()  # as the end of `python train.py` does: the next run is one of its own
                one.result = "ok"
            else:
                ends = two_processes(folder.parent.parent, lambda rank, f=folder, o=options: run(f, *o))
                one.result = "ok" if all(code == 0 for code, _ in ends) else ends[0][1]


@pytest.fixture
def forked(monkeypatch):
    monkeypatch.setattr(benchmark_scaling, "Host", Forked)
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_all_parts(forked, tmp_path, capsys):
    given = [
        "--device",
        "cpu",
        "--tiny",
        "--beside",
        "--workloads",
        "dna_16k",
        "--strategies",
        "ddp",
        "--variant",
        "cap",
        "trainer.strategy.bucket_cap_mb=25",
        "--out",
        str(tmp_path),
    ]
    rows = benchmark_scaling.main([*given, "--work", str(tmp_path / "work")])
    assert [r["result"] for r in rows if not r["result"].startswith("ok")] == []
    assert [(r["part"], r["run"], r["GPUs"]) for r in rows] == [
        ("curves", "single", 1),
        ("curves", "ddp 2", 2),
        ("curves", "single, 2 half batches", 1),
        ("checks", "ddp: one folder", 2),
        ("checks", "ddp: test of 2 by 1", 1),
        ("checks", "ddp: 2 resumed on 1", 1),
        ("throughput", "single", 1),
        ("throughput", "ddp", 2),
        ("throughput", "ddp cap", 2),
    ]
    assert 0 < rows[1]["max diff"] < 1e-3 and rows[0]["max diff"] == 0
    for row in rows[7:]:
        assert row["efficiency"] == pytest.approx(row["samples/s"] / rows[6]["samples/s"] / 2)
    assert (tmp_path / "scaling.png").is_file() and (tmp_path / "scaling_curves.csv").is_file()
    assert "efficiency" in capsys.readouterr().out


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, capsys):
    a = benchmark_scaling.arguments(["--device", "cpu", "--tiny", "--minutes", "1"])
    host = benchmark_scaling.Host([0, 1], a, tmp_path, tmp_path / "failed.txt")
    wrong = benchmark_scaling.Run("wrong", "patches", "single", 1, [*TINY, "model.mixer.headdim=7"])
    host.run([wrong])
    assert wrong.result == "failed (1)" and not wrong.ok
    for text in (capsys.readouterr().out, (tmp_path / "failed.txt").read_text()):
        assert "headdim: expected a divisor" in text
    host.end = 0.0
    late = benchmark_scaling.Run("late", "patches", "single", 1, [])
    host.run([late], alone=True)
    assert late.result == "left out: no time"


def test_a_run_that_hangs_says_where(tmp_path, monkeypatch, capsys):
    a = benchmark_scaling.arguments(["--device", "cpu", "--tiny", "--timeout", "1.5"])
    (tmp_path / "train.py").write_text("import time\ndef stuck():\n    time.sleep(60)\nstuck()\n")
    monkeypatch.setattr(benchmark_scaling, "ROOT", tmp_path)
    run = benchmark_scaling.Run("hangs", "patches", "single", 1, [])
    benchmark_scaling.Host([0], a, tmp_path, tmp_path / "failed.txt").run([run])
    assert run.result.startswith("timeout") and "in stuck" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--variant", "graph", "a=1"], "other than graph, got 'graph'"),
        (["--variant", "a/b", "a=1"], "got 'a/b'"),
        (["--variant", "a", "a=1", "--strategies", "fsdp"], "expected --strategies ddp"),
        (["--variant", "fsdp_a", "a=1", "--strategies", "ddp"], "expected --strategies fsdp"),
    ],
)
def test_variants_that_could_not_run_are_refused(more, said, capsys):
    with pytest.raises(SystemExit):
        benchmark_scaling.arguments(["--device", "cpu", "--tiny", *more])
    assert said in capsys.readouterr().err
