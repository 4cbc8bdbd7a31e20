"""DistributedDataParallel over two processes (gloo): learning, resuming, signals and numerical health as of one."""

import json
import os
import re
import signal

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback
from processes import two_processes
from runs import DIGITS, entered, load, run, train

from bimamba import replay as replaying
from bimamba.callbacks import Checkpoints

# 6 batches an epoch in each process, which are 2 times 128 rows
OPTIONS = [*DIGITS, "trainer=ddp_sim", "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"]
OPTIONS += [
    "data.batch_size=128",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=2",
    "model.dropout=0.1",
    "test=false",
]
OPTIONS += ["callbacks.learning_curves=null", "callbacks.examples=null", "callbacks.throughput=null"]


class Spy(Callback):
    """Writes down what each step saw, and does something at one of them, in one process."""

    def __init__(self, folder, at=None, rank=None, act=None):
        self.folder, self.at, self.rank, self.act, self.seen = folder, at, rank, act, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.act and (trainer.current_epoch, batch_idx) == (0, self.at) and trainer.global_rank == self.rank:
            self.act(batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[f"{trainer.current_epoch} {batch_idx}"] = outputs["loss"].item()
        path = self.folder / f"seen_{trainer.global_rank}.json"
        path.write_text(json.dumps(self.seen))


def trained(folder, output_dir, *overrides, **spy):
    """Outcome of both processes: exit code, what was printed, loss of each step."""
    folder.mkdir(exist_ok=True)

    def work(rank):
        made = train.make_callbacks
        train.make_callbacks = lambda cfg: [*made(cfg), Spy(folder, **spy)]
        with train.config.clear_errors():
            run(output_dir, *overrides)

    codes, said = zip(*two_processes(folder, work), strict=True)
    return codes, said, [json.loads((folder / f"seen_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("checkpoints", ["true", "false"])
def test_no_process_waits_for_its_device_at_every_batch(tmp_path, monkeypatch, checkpoints):
    """Lightning (2.6) asks the first process about SIGTERM before each batch, and reads the answer on the host."""
    broadcast = torch.distributed.broadcast

    def told(*args, **options):
        print("a broadcast:", args[0].dtype, args[0].numel())
        return broadcast(*args, **options)

    monkeypatch.setattr(torch.distributed, "broadcast", told)
    options = [*OPTIONS, f"trainer.enable_checkpointing={checkpoints}"]
    codes, said, _ = trained(tmp_path, tmp_path / "run", *options)
    assert codes == (0, 0), said
    assert "a broadcast: torch.int64 1\n" not in said[0] + said[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    codes, said, seen = trained(folder, folder / "run", *OPTIONS)
    assert codes == (0, 0), said
    return folder / "run", seen


def same_weights(one, two):
    one, two = (load(p / "checkpoints" / "last.ckpt")["state_dict"] for p in (one, two))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_signal_to_one_process_saves_and_stops_both_and_they_go_on_as_if_it_had_not(whole, tmp_path):
    def told(batch):
        os.kill(os.getpid(), signal.SIGUSR1)

    codes, said, first = trained(tmp_path / "a", tmp_path / "run", *OPTIONS, at=2, rank=1, act=told)
    assert codes == (138, 138), said
    path = tmp_path / "run" / "checkpoints" / "interrupted.ckpt"
    assert f"python train.py ckpt_path={path}" in said[0]
    assert load(path)["global_step"] == 4  # they agree at every other
    codes, said, second = trained(tmp_path / "b", tmp_path / "run", f"ckpt_path={path}", "extras.print_config=false")
    assert codes == (0, 0), said
    assert all(min(s) == "0 4" for s in second) and [a | b for a, b in zip(first, second, strict=True)] == whole[1]
    same_weights(whole[0], tmp_path / "run")


@pytest.mark.parametrize(("count", "steps"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4])])
def test_several_processes_ask_for_the_time_of_a_checkpoint_every_other_batch(tmp_path, monkeypatch, count, steps):
    """`log_every_n_steps` is 2: at every batch their hosts would wait for the devices."""
    options = [*OPTIONS, "callbacks.model_checkpoint.train_time_interval={microseconds: 1}"]
    saved = Checkpoints._save_last

    def noted(self, trainer):
        with (tmp_path / f"saved_{trainer.global_rank}.txt").open("a") as file:
            print(trainer.global_step, file=file)
        saved(self, trainer)

    monkeypatch.setattr(Checkpoints, "_save_last", noted)
    if count == 1:
        run(tmp_path / "run", *options, "trainer=cpu", "data.batch_size=256")
    else:
        outcome = two_processes(tmp_path, lambda rank: run(tmp_path / "run", *options))
        assert [code for code, _ in outcome] == [0, 0], outcome
    for rank in range(count):
        assert list(map(int, (tmp_path / f"saved_{rank}.txt").read_text().split())) == steps


@pytest.mark.parametrize(
    ("action", "strategy", "fused"),
    [("stop", "ddp_sim", "false"), ("skip", "ddp_sim", "false"), ("skip", "ddp_sim", "true"), ("stop", "fsdp", "true")],
)
def test_what_is_not_finite_in_one_process_is_named_and_saved_by_both(tmp_path, capsys, action, strategy, fused):
    def overflow(batch):
        batch["inputs"][5, 0, 3, 3] = torch.inf

    options = [
        f"trainer={strategy}",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.enable_progress_bar=false",
    ]
    options += [f"callbacks.health.action={action}", "trainer.accumulate_grad_batches=2"]
    options += [f"+task.optimizer.fused={fused}"]
    options += ["trainer.enable_model_summary=false", *(["trainer.precision=bf16-mixed"] * (strategy == "ddp_sim"))]
    # the second of the two batches of step 1, in the second process
    codes, said, seen = trained(tmp_path, tmp_path / "run", *OPTIONS, *options, at=3, rank=1, act=overflow)
    assert codes == ((1, 1) if action == "stop" else (0, 0)), said
    # a fused optimizer leaves the step out by itself, and it is found in the next one
    assert list(seen[0]) == [f"0 {i}" for i in range(6 if action == "skip" else 5 if fused == "true" else 3)]
    path = tmp_path / "run" / "nonfinite" / "step_1.ckpt"
    found = "not finite at step 1 (epoch 0, batch 3): the batch's inputs are not finite (0 NaN and 1"
    assert all(found in text for text in said) if action == "stop" else found in said[0], said
    assert replaying.main([re.search(r"python -m bimamba\.replay (.*)", said[0]).group(1), "--accelerator", "cpu"]) == 0
    assert load(path)["nonfinite"]["batch"]["inputs"][5, 0, 3, 3] == torch.inf
    then, now = capsys.readouterr().out.split("at the time: ")[1].split("\nnow:         ")
    assert now.strip() == then.strip() and then.startswith("the batch's inputs are not finite")
    if action == "skip":  # both left the step out, and are one network still
        weights = load(tmp_path / "run" / "checkpoints" / "last.ckpt")
        assert weights["global_step"] == 3 and all(torch.isfinite(w).all() for w in weights["state_dict"].values())
        assert "The step is left out" in said[0]


COMMON = [*DIGITS, "data.augment.crop_padding=0", "data.drop_last=true", "task.optimizer.lr=0.01"]
COMMON += ["trainer.max_epochs=1", "callbacks.learning_curves=null", "callbacks.examples=null"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: batches of 256, as 2 times 128; 359 rows are tested: odd."""
    folder = tmp_path_factory.mktemp("one")
    return folder, run(folder, *COMMON)


@pytest.mark.parametrize("trainer", ["ddp_sim", "fsdp"])
def test_two_processes_learn_and_measure_what_one_does(alone, tmp_path, trainer):
    folder, one = alone
    two = [f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=128"]
    two += ["trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"]

    def work(rank):
        if rank:
            train.write_json = None  # one process alone writes the run's files: two would take them from each other
        entered(tmp_path / "two", *COMMON, *two)

    outcome = two_processes(tmp_path, work)
    assert [code for code, _ in outcome] == [0, 0], outcome
    both = json.loads((tmp_path / "two" / "metrics.json").read_text())
    for key in ("train/loss", "val/loss", "test/loss", "test/auroc"):
        assert both[key] == pytest.approx(one[key], rel=1e-3), key
    tables = [pq.read_table(f / "predictions.parquet").to_pylist() for f in (folder, tmp_path / "two")]
    assert [(r["id"], r["label"]) for r in tables[0]] == [(r["id"], r["label"]) for r in tables[1]]
    # a checkpoint of both, whole, is evaluated by one to the same figures
    again = run(tmp_path / "again", "stage=test", f"ckpt_path={tmp_path / 'two' / 'checkpoints' / 'best.ckpt'}")
    assert {k: again[k] for k in again if k.startswith("test/")} == pytest.approx(
        {k: both[k] for k in both if k.startswith("test/")}, abs=1e-6
    )
