"""The benchmark of an experiment's step composes as train.py does, and measures its own model on its own data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmark"))
import benchmark_experiment


def test_measures_an_arm_of_the_ablation():
    overrides = ["data.batch_size=8", "model.d_model=32", "model.depth=1", "model.mixer.headdim=16"]
    parameters = {}
    for arm in ("causal", "attention"):
        cfg = benchmark_experiment.composed([*overrides, f"ablation={arm}"])
        spec, batch = benchmark_experiment.first_batch(cfg, "cpu")
        row = benchmark_experiment.measure(arm, cfg, spec, batch, "cpu", steps=1)
        assert row["value"] == arm and row["eager, samples/s"] == pytest.approx(8e3 / row["eager, ms"])
        parameters[arm] = row["parameters"]
    assert parameters["causal"] != parameters["attention"]


def test_wrong_option_is_refused():
    with pytest.raises(ValueError, match="depht"):
        benchmark_experiment.composed(["+model.depht=2"])
