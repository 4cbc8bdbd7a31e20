"""bimamba.collect: which runs are repetitions of which setting, the figures, and every bad input."""

import csv
import json

import numpy as np
import pytest
import yaml
from PIL import Image
from runs import DIGITS, run

from bimamba.collect import bootstrap_mean, main


def fake(root, name, value, seed=0, metric="test/mcc", **keys):
    """The folder of a finished run."""
    folder = root / name
    folder.mkdir(parents=True)
    config = {"task_name": "digits", "stage": "fit", "seed": seed, "monitor": "val/mcc", "paths": {"output_dir": name}}
    config |= {
        "model": {"depth": 2, "mixer": {"_target_": "bimamba.nn.BiMamba2", "d_state": 8}},
        "data": {"fold": None},
    }
    config["callbacks"] = {"checkpoint": {"dirpath": f"{name}/checkpoints"}}
    for key, entry in keys.items():
        node = config
        *path, leaf = key.split("__")
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = entry
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps({metric: value, "val/mcc": value}))
    return folder


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_repetitions_are_told_from_settings(tmp_path, capsys):
    values = {2: [0.5, 0.6, 0.7], 4: [0.8, 0.8, 0.9]}
    for depth, numbers in values.items():
        for seed, value in enumerate(numbers):
            fake(tmp_path, f"{depth}{seed}", value, seed, model__depth=depth, data__seed=seed, logger__csv__name=seed)
    # an evaluation beneath a run is no run of its own
    fake(tmp_path, "20/test/now", 0.1, stage="test")
    summaries = main([str(tmp_path)])
    assert [s.setting for s in summaries] == ["depth=2", "depth=4"] and {s.metric for s in summaries} == {"test/mcc"}
    first = rows(tmp_path / "collected" / "table.csv")[0]
    assert (first["n"], float(first["mean"]), float(first["sd"])) == ("3", pytest.approx(0.6), pytest.approx(0.1))
    assert (float(first["min"]), float(first["max"])) == (0.5, 0.7)
    assert 0.5 <= float(first["ci_low"]) < 0.6 < float(first["ci_high"]) <= 0.7
    text = (tmp_path / "collected" / "table.md").read_text()
    assert "| depth=2 | test/mcc | 3 | 0.6000 ± 0.1000 | 0.5000 – 0.7000 |" in text and text in capsys.readouterr().out
    assert {(r["setting"], r["seed"]) for r in rows(tmp_path / "collected" / "runs.csv")} == {
        (f"depth={d}", str(s)) for d in (2, 4) for s in range(3)
    }
    with Image.open(tmp_path / "collected" / "test_mcc.png") as image:
        assert np.asarray(image.convert("RGB")).std() > 5
    assert main([str(tmp_path)])[0].low == summaries[0].low  # seeded
    assert main([str(tmp_path), "--seed", "1", "--resamples", "50"])[0].low != summaries[0].low


def test_a_distillation_without_teachers_is_no_setting(tmp_path):
    """Nor is that an earlier version did not know of it."""
    off = {"_target_": "bimamba.tasks.Distillation", "teachers": [], "weight": 0.5}
    fake(tmp_path, "old", 0.5, 0)
    fake(tmp_path, "new", 0.6, 1, task__distill=off)
    assert [s.setting for s in main([str(tmp_path)])] == ["digits"]
    fake(tmp_path, "taught", 0.7, 2, task__distill={**off, "teachers": ["logs/a"]})
    assert len(main([str(tmp_path)])) == 2


def test_the_interval_covers_the_mean():
    """A percentile bootstrap of 40 draws covers the true mean in about 95 of 100 cases."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_mean(rng.normal(3.0, 1.0, 40), resamples=400)
        covered += low < 3.0 < high
    assert 0.88 < covered / 200 < 0.99
    assert np.isnan(bootstrap_mean(np.array([1.0]))).all()


def test_keys_that_change_together_are_one_name(tmp_path, capsys):
    fake(tmp_path, "a", 0.5)
    fake(tmp_path, "b", 0.6, model__mixer={"_target_": "bimamba.nn.Attention", "headdim": 4})
    fake(tmp_path, "c", 0.7, model__mixer={"_target_": "bimamba.nn.Attention", "headdim": 4}, model__depth=4)
    names = [s.setting for s in main([str(tmp_path)])]
    assert names == ["depth=2, mixer=Attention", "depth=2, mixer=BiMamba2", "depth=4, mixer=Attention"]
    said = capsys.readouterr().out
    assert "model.mixer._target_ stands for what changes with it: model.mixer.d_state, model.mixer.headdim" in said


def test_by_a_key_of_ones_choice(tmp_path, capsys):
    for i, depth in enumerate((2, 2, 4)):
        fake(tmp_path, str(i), i / 10, seed=0, model__depth=depth, model__width=i)
    summaries = main([str(tmp_path), "--by", "model.depth"])
    assert [(s.setting, len(s.values)) for s in summaries] == [("depth=2", 2), ("depth=4", 1)]
    assert "within a setting these differ too: model.width" in capsys.readouterr().out


def test_what_is_left_out_is_said(tmp_path, capsys):
    fake(tmp_path, "a", 0.5)
    fake(tmp_path, "b", 0.6)  # the same seed again
    unfinished = fake(tmp_path, "c", 0.7, seed=1)
    (unfinished / "metrics.json").unlink()
    summaries = main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert summaries[0].values.tolist() == [0.6] and np.isnan(summaries[0].deviation)
    said = capsys.readouterr().out
    assert "same seed and fold twice" in said and f"not finished: {unfinished}" in said
    assert rows(tmp_path / "out" / "table.csv")[0]["sd"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such folder"),
        (["empty"], "no finished training in .*: there is no config.yaml of a run"),
        (["tested"], "no finished training in .*: there are 1 of stage test"),
        (["one", "other"], "mixed experiments, digits, promoters: .* --by task_name"),
        (
            ["one", "--metric", "test/auroc"],
            "test/auroc: 1 of 1 runs have no such number, .*all have test/mcc, val/mcc",
        ),
        (["cut"], r"metrics\.json is damaged"),
        (["broken"], "test/mcc: 1 of 1 runs have no such number"),
        (["one", "--by", "model.dept"], "--by model.dept: no such key"),
        (["one", "--resamples", "0"], "--resamples: expected at least 1, got 0"),
    ],
)
def test_bad_inputs(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    fake(tmp_path / "tested", "a", 0.5, stage="test")
    fake(tmp_path / "one", "a", 0.5)
    fake(tmp_path / "other", "a", 0.5, task_name="promoters")
    fake(tmp_path / "broken", "a", float("nan"))
    fake(tmp_path / "cut", "a", 0.5)
    (metrics,) = (tmp_path / "cut").rglob("metrics.json")
    metrics.write_text(metrics.read_text()[:-5])
    arguments = [str(tmp_path / a) if (tmp_path / a).exists() or a == "nowhere" else a for a in arguments]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(arguments)
    both = [str(tmp_path / "one"), str(tmp_path / "other"), "--by", "task_name"]
    assert [s.setting for s in main(both)] == ["task_name=digits", "task_name=promoters"]


def test_folds_end_to_end(tmp_path):
    """Real runs of a cross-validation."""
    for fold in (0, 1):
        options = ["data.num_folds=2", f"data.fold={fold}", "trainer.max_epochs=1", "monitor=val/loss"]
        run(tmp_path / str(fold), *DIGITS, *options, "logger=none", "trainer.enable_checkpointing=false")
    (summary,) = main([str(tmp_path)])
    assert summary.setting == "digits" and summary.metric == "test/loss" and len(set(summary.values)) == 2
    assert [r["data.fold"] for r in rows(tmp_path / "collected" / "runs.csv")] == ["0", "1"]
    with pytest.raises(Exception, match=r"data.fold: expected 0 to 1 \(num_folds=2\), got 2"):
        run(tmp_path / "2", *DIGITS, "data.num_folds=2", "data.fold=2")
