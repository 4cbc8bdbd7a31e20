"""What DDP and FSDP are asked for, what is refused, and sharded checkpoints that any other training resumes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.plugins.precision import FSDPPrecision
from omegaconf import OmegaConf
from processes import two_processes
from runs import DIGITS, load, run, train
from torch import nn
from torch.distributed.fsdp import MixedPrecision

from bimamba.nn import BiMamba2
from bimamba.strategies import ReplicatedStrategy, ShardedStrategy


def test_replicas_on_gpus_are_not_told_their_device(monkeypatch):
    """Else torch walks through the ids of each batch, and gradients are accumulated on another stream."""
    told = {}
    monkeypatch.setattr("lightning.pytorch.strategies.ddp.DistributedDataParallel", lambda **kw: told.update(kw))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: pytest.fail("a stream of its own"))
    strategy = instantiate(OmegaConf.load(Path(__file__).parents[1] / "configs/trainer/ddp.yaml").strategy)
    assert isinstance(strategy, ReplicatedStrategy)
    strategy.parallel_devices = [torch.device("cuda", 0)]
    strategy._setup_model(nn.Linear(2, 2))
    assert told["device_ids"] is None and told["gradient_as_bucket_view"] is True


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_devices_without_a_strategy_of_ours_are_replicas_too(strategy):
    trainer = train.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, ReplicatedStrategy)
    assert trainer.strategy._ddp_kwargs == {"gradient_as_bucket_view": True}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_parameters_stay_float32_under_mixed_precision(precision):
    """With Lightning's own answer A_log, dt_bias and D would be computed with in bf16."""
    assert ShardedStrategy(precision_plugin=FSDPPrecision(precision)).mixed_precision_config is None


def test_other_precisions_are_lightnings_or_the_users():
    asked = MixedPrecision(reduce_dtype=torch.bfloat16)
    plugin = FSDPPrecision("bf16-mixed")
    assert ShardedStrategy(precision_plugin=plugin, mixed_precision=asked).mixed_precision_config is asked
    true = ShardedStrategy(precision_plugin=FSDPPrecision("bf16-true")).mixed_precision_config
    assert true.param_dtype == torch.bfloat16


def test_a_compiled_network_is_refused():
    net = nn.Sequential(BiMamba2(16, headdim=8, d_state=8))
    net.compile(backend="eager")
    with pytest.raises(ValueError, match=r"task\.compile: expected false with trainer=fsdp"):
        ShardedStrategy()._setup_model(net)


OPTIONS = [*DIGITS, "data.augment.crop_padding=0", "data.drop_last=true", "task.optimizer.lr=0.01", "test=false"]
OPTIONS += ["callbacks.learning_curves=null", "callbacks.examples=null", "callbacks.throughput=null"]
OPTIONS += ["task.scheduler=null"]  # which would depend on the length of each part of the training


def two(folder, output_dir, trainer, *more):
    options = [*OPTIONS, f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=128"]
    outcome = two_processes(folder, lambda rank: run(output_dir, *options, *more))
    assert [code for code, _ in outcome] == [0, 0], outcome
    return json.loads((output_dir / "metrics.json").read_text())


def test_one_process_ddp_and_fsdp_go_on_from_each_other(tmp_path):
    """Two groups of parameters: an optimizer's state that is numbered otherwise goes to other parameters."""
    run(tmp_path / "one", *OPTIONS, "trainer.max_epochs=1")
    shutil.copytree(tmp_path / "one", tmp_path / "sharded")
    last = "checkpoints/last.ckpt"
    alone = run(tmp_path / "one", *OPTIONS, f"ckpt_path={tmp_path / 'one' / last}", "trainer.max_epochs=3")
    goes_on = f"ckpt_path={tmp_path / 'sharded' / last}"
    two(tmp_path, tmp_path / "sharded", "fsdp", goes_on, "trainer.max_epochs=2")
    metrics = two(tmp_path, tmp_path / "sharded", "ddp_sim", goes_on, "trainer.max_epochs=3")
    assert metrics["train/loss"] == pytest.approx(alone["train/loss"], rel=1e-5)
    states = [load(tmp_path / name / last)["optimizer_states"][0] for name in ("one", "sharded")]
    assert [g["params"] for g in states[0]["param_groups"]] == [g["params"] for g in states[1]["param_groups"]]
    for number, state in states[0]["state"].items():
        torch.testing.assert_close(states[1]["state"][number]["exp_avg"], state["exp_avg"], atol=1e-6, rtol=1e-3)
