"""What DDP and FSDP are asked for, what is refused, how gradients are averaged, and sharded checkpoints that any other
training resumes."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import FSDPPrecision
from omegaconf import OmegaConf
from processes import two_processes
from runs import DIGITS, QUIET, load, run, train
from torch import nn
from torch.distributed.fsdp import MixedPrecision

from bimamba.nn import BiMamba2, Block
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
    assert told["device_ids"] is None and told["gradient_as_bucket_view"] is True and not told["broadcast_buffers"]


@pytest.mark.parametrize(
    ("options", "size", "overlaps"),
    [
        ({}, 8, False),
        ({}, 3000, True),  # 36 MB
        ({"overlap": True}, 8, True),
        ({"overlap": False}, 3000, False),
        ({"find_unused_parameters": True}, 8, True),
        ({"broadcast_buffers": True}, 8, True),
        ({"broadcast_buffers": False, "gradient_as_bucket_view": True}, 8, False),
    ],
)
def test_gradients_of_small_networks_are_averaged_behind_the_backward_pass(monkeypatch, options, size, overlaps):
    class Network(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(size, size)

    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: sent.append(tensor.shape))
    monkeypatch.setattr("lightning.pytorch.strategies.ddp.DistributedDataParallel", lambda **kw: "wrapped")
    strategy = ReplicatedStrategy(parallel_devices=[torch.device("cpu")], **options)
    strategy.model = Network()
    strategy.configure_ddp()
    assert (strategy.model == "wrapped") is overlaps and len(sent) == (0 if overlaps else 2)


def test_what_needs_torchs_own_averaging_is_refused_without_it():
    with pytest.raises(ValueError, match=r"trainer\.strategy\.static_graph: expected trainer\.strategy\.overlap=true"):
        ReplicatedStrategy(overlap=False, static_graph=True)
    for wrong in ("maybe", 0):
        with pytest.raises(ValueError, match=r"trainer\.strategy\.overlap: expected true, false or null, got"):
            ReplicatedStrategy(overlap=wrong)


class Seen(Callback):
    """The gradients as callbacks find them behind each backward pass."""

    def __init__(self):
        self.norms = []

    def on_after_backward(self, trainer, pl_module):
        self.norms.append([float(p.grad.norm()) for p in pl_module.parameters() if p.grad is not None])


class Rows(LightningModule):
    """A regression on rows that differ between processes. `fault`: `idle` leaves a layer out of the loss, `sparse`
    makes a gradient sparse, `aside` goes back from another tensor than the loss that it returns."""

    def __init__(self, fault):
        super().__init__()
        self.layer, self.frozen, self.fault = nn.Linear(3, 1), nn.Linear(3, 1).requires_grad_(False), fault
        self.double_layer = nn.Linear(3, 1, dtype=torch.float64)
        self.table = nn.Embedding(4, 1, sparse=fault == "sparse")

    def training_step(self, batch, batch_idx):
        x = torch.full((2, 3), float(2 * batch_idx + self.trainer.global_rank + 1))
        loss = (self.layer(x) + self.frozen(x)).square().mean() + self.table(batch % 4).mean()
        if self.fault != "idle":
            loss = loss + self.double_layer(x.double()).float().square().mean()
        self.loss = loss
        return loss.detach().requires_grad_() if self.fault == "aside" else loss

    def backward(self, loss):
        (self.loss if self.fault == "aside" else loss).backward()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fitted(folder, fault=None, accumulate=1, **options):
    def work(rank):
        torch.manual_seed(rank)  # the first one's weights count
        seen = Seen()
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=ReplicatedStrategy(**options),
            callbacks=[seen],
            max_steps=3,
            accumulate_grad_batches=accumulate,
            **QUIET,
        )
        network = Rows(fault)
        trainer.fit(network, torch.utils.data.DataLoader(range(12), batch_size=1))
        weights = {name: p.tolist() for name, p in network.named_parameters()}
        (folder / f"{rank}.json").write_text(json.dumps([weights, seen.norms]))

    outcome = two_processes(folder, work)
    return outcome, [json.loads(path.read_text()) for path in sorted(folder.glob("?.json"))]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_both_ways_of_averaging_train_alike(tmp_path, accumulate):
    """Weights of the first process, two dtypes, a frozen part, and what callbacks see behind the backward pass."""
    (said, behind), (also_said, during) = (
        fitted(tmp_path / str(overlap), accumulate=accumulate, overlap=overlap) for overlap in (False, True)
    )
    assert [code for code, _ in said + also_said] == [0] * 4, said + also_said
    assert behind[0][0] == behind[1][0]  # the processes hold the same weights
    last = slice(accumulate - 1, None, accumulate)  # where gradients were averaged
    assert behind[0][1][last] == behind[1][1][last] and behind[0][1][0] != behind[0][1][1]
    if accumulate == 2:
        assert behind[0][1][0] != behind[1][1][0]  # not yet
    for mine, torchs in zip(behind, during, strict=True):
        assert mine[0].keys() == torchs[0].keys()
        for name, value in mine[0].items():
            torch.testing.assert_close(torch.tensor(value), torch.tensor(torchs[0][name]), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(torch.tensor(mine[1]), torch.tensor(torchs[1]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("fault", "message", "way_out"),
    [
        ("idle", "2 got none (double_layer.weight, double_layer.bias)", "find_unused_parameters=true"),
        ("sparse", "that of table.weight is sparse", "overlap=true"),
        ("aside", "expected to begin at the loss that training_step returned, and did not", "overlap=true"),
    ],
)
def test_what_cannot_be_averaged_is_said_with_a_way_out(tmp_path, fault, message, way_out):
    outcome, _ = fitted(tmp_path, fault)
    for code, said in outcome:
        assert code == 1 and message in said and f"trainer.strategy.{way_out} allows for it" in said, said
    key, _, value = way_out.partition("=")
    outcome, ends = fitted(tmp_path, fault, **{key: value == "true"})
    assert [code for code, _ in outcome] == [0, 0] and ends[0][0] == ends[1][0], outcome


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


@pytest.mark.parametrize(("options", "units"), [({}, [2]), ({"min_unit": 0}, [0, 1, 2]), ({"min_unit": 10**9}, [])])
def test_large_blocks_are_gathered_by_themselves(options, units):
    sizes = (8, 16, 512)  # 1.2 million parameters in the last block
    net = nn.Sequential(*(Block(d, partial(BiMamba2, headdim=8, d_state=8)) for d in sizes), nn.Linear(1024, 1024))
    policy = ShardedStrategy(**options).kwargs["auto_wrap_policy"]
    assert list(policy._run_policy(net, set(), {})) == [net[i] for i in units]


@pytest.mark.parametrize("wrong", [None, -1, "many"])
def test_a_wrong_size_is_refused(wrong):
    with pytest.raises(ValueError, match=r"trainer\.strategy\.min_unit: expected a number of parameters, .*got"):
        ShardedStrategy(min_unit=wrong)


def test_what_is_wrapped_is_the_users_to_say():
    assert ShardedStrategy(auto_wrap_policy={nn.Linear}).kwargs["auto_wrap_policy"]._module_classes == {nn.Linear}


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
    """Two groups of parameters: an optimizer's state that is numbered otherwise goes to other parameters. Every block
    is gathered by itself; all of a small network at once in `test_two_processes.py`."""
    run(tmp_path / "one", *OPTIONS, "trainer.max_epochs=1")
    shutil.copytree(tmp_path / "one", tmp_path / "sharded")
    last = "checkpoints/last.ckpt"
    alone = run(tmp_path / "one", *OPTIONS, f"ckpt_path={tmp_path / 'one' / last}", "trainer.max_epochs=3")
    goes_on = f"ckpt_path={tmp_path / 'sharded' / last}"
    two(tmp_path, tmp_path / "sharded", "fsdp", goes_on, "trainer.max_epochs=2", "trainer.strategy.min_unit=0")
    metrics = two(tmp_path, tmp_path / "sharded", "ddp_sim", goes_on, "trainer.max_epochs=3")
    assert metrics["train/loss"] == pytest.approx(alone["train/loss"], rel=1e-5)
    states = [load(tmp_path / name / last)["optimizer_states"][0] for name in ("one", "sharded")]
    assert [g["params"] for g in states[0]["param_groups"]] == [g["params"] for g in states[1]["param_groups"]]
    for number, state in states[0]["state"].items():
        torch.testing.assert_close(states[1]["state"][number]["exp_avg"], state["exp_avg"], atol=1e-6, rtol=1e-3)
