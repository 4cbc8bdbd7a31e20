"""Several GPUs of one host: `python train.py …` as users type it, on 1, 2, 4, … of them, by DDP and by FSDP.

    python benchmark/benchmark_scaling.py --cifar FOLDER --out FOLDER         # all GPUs, all parts
    python benchmark/benchmark_scaling.py --parts throughput --workloads dna_16k --devices 1 2
    python benchmark/benchmark_scaling.py --device cpu --tiny                 # does it run (gloo, two processes)

Workloads: `patches` is experiment=cifar10_patches with data.cache=device, 1,024 images a GPU; `dna_16k` is
experiment=dna_pretrain on windows of 16,384 letters (d_model 256, depth 8, 8 windows a GPU) of a simulated genome that
the script writes: letters of a Markov chain of order 3, so that there is something to learn. `dna_wide` is the same
with d_model 1024, depth 12 and 4 windows: of a size (80M) that FSDP is for. All in bf16-mixed on GPUs.

Parts:

    curves      Same seed, same GLOBAL batch: a process has global / N rows, and the samplers deal out the same rows at
                each step for any N. Nothing is drawn at random per process (no augmentation of images, mix, drop path).
                An epoch is 10 steps, and `train/loss`, the mean over its rows and all processes, is the curve.
                Columns: largest and mean difference from the run on one GPU. The yardstick is one GPU that adds up
                two half batches: another order of summation, and like processes it takes the mean of means, though
                halves of dna_16k do not hide quite the same number of letters.
    checks      Of the runs on the most GPUs: one output folder with one config.yaml, metrics.json and, of a classifier,
                predictions.parquet, and one offline W&B run; test metrics of N processes equal to those of `stage=test`
                in one (1e-6; 1e-3 for losses and what depends on the ranks of probabilities, which bf16 rounds);
                training resumed on another number of GPUs: steps go on, and the first epoch's loss is within a tenth
                of the last one's.
    throughput  Same batch on EACH GPU, epochs of the same number of steps, the experiment's own augmentation:
                `performance/samples_per_second`, the median over epochs (of 10 steps or, on 8 GPUs, 5) after the first
                two; waiting for data counts, validation and checkpoints do not. One run at a time, or (--beside) those
                of few GPUs at once on different ones, which share the host alone. Efficiency: rate on N / (N x rate on
                one GPU, without a strategy, of the same workload; as graphs: as a graph). `patches` with DDP also as
                CUDA graphs (task.compile_options.mode=reduce-overhead); `--variant NAME OVERRIDE` (again for more
                overrides of that name) adds one more run of DDP, or of FSDP where the name begins with fsdp.

Runs of `curves` and `checks` go side by side on different GPUs. A run that fails, or takes longer than --timeout (its
processes' stacks are printed then), is marked, and the others go on. Written after every run: OUT/scaling.csv,
OUT/scaling_curves.csv, OUT/scaling_failed.txt; at the end OUT/scaling.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scans import FOLDER, hardware

ROOT = Path(__file__).parents[1]
PARTS, STRATEGIES = ("curves", "checks", "throughput"), ("ddp", "fsdp")
WORKLOADS = ("patches", "dna_16k", "dna_wide")
EPOCH = 10  # steps that one point of a curve is the mean of
COLUMNS = ["part", "workload", "run", "GPUs", "samples/s", "efficiency", "last loss", "max diff", "mean diff"]
COLUMNS += ["result", "seconds"]


@dataclass(frozen=True)
class Workload:
    """Overrides of all its runs, of its curves, rows a GPU, and steps."""

    overrides: tuple[str, ...]
    still: tuple[str, ...]  # what turns random numbers of each process off
    batch: int
    points: int  # of a curve, each of EPOCH steps
    steps: int  # of a throughput run
    per_epoch: int  # steps of a throughput run's epoch, on any number of GPUs: the data have rows for the most
    table: bool = False  # a test writes predictions.parquet


COMMON = ("callbacks.average.decay=null", "trainer.enable_progress_bar=false", "extras.print_config=false")
COMMON += ("data.drop_last=true",)
STILL_IMAGES = ("data.augment.crop_padding=0", "data.augment.horizontal_flip=0", "data.augment.trivial_augment=0")
STILL_IMAGES += ("data.augment.random_erasing=0", "data.mix.mixup=0", "data.mix.cutmix=0", "model.drop_path=0")
DNA = ("experiment=dna_pretrain", "model.mixer.d_state=64", "data.val_fraction=0.06", "data.test_fraction=0.06")


def workloads(a: argparse.Namespace, genome: Path) -> dict[str, Workload]:
    dna = (*DNA, f"data.path={genome}")
    if a.tiny:
        small = ("model.d_model=16", "model.depth=1", "model.mixer.headdim=8", "model.mixer.d_state=8")
        return {
            "patches": Workload(("experiment=digits", *small), STILL_IMAGES, 32, 2, 40, 10, table=True),
            "dna_16k": Workload((*dna, *small, "data.window=256"), (), 8, 2, 40, 10),
            "dna_wide": Workload((*dna, *small, "model.d_model=32", "data.window=256"), (), 4, 2, 40, 10),
        }
    images = ("experiment=cifar10_patches", f"data.path={a.cifar}", "data.cache=device")
    dna = (*dna, "model.mixer.headdim=64", "data.window=16384", "data.num_workers=2")
    size, wide = ("model.d_model=256", "model.depth=8"), ("model.d_model=1024", "model.depth=12")
    return {
        "patches": Workload(images, STILL_IMAGES, 1024, 20, 240, max(40 // max(a.devices), 1), table=True),
        "dna_16k": Workload((*dna, *size), (), 8, 20, 140, 28),
        "dna_wide": Workload((*dna, *wide), (), 4, 20, 60, 12),
    }


def write_genome(path: Path, records: int, length: int) -> None:
    """Records of a Markov chain of order 3 whose next letter is mostly, but not always, the same."""
    rng = np.random.default_rng(0)
    chances = rng.dirichlet([0.25] * 4, 64).cumsum(1)
    text, state = np.empty((records, length), np.uint8), rng.integers(64, size=records)
    for i in range(length):
        letter = (rng.random(records)[:, None] > chances[state][:, :3]).sum(1)
        text[:, i], state = letter, state % 16 * 4 + letter
    letters = np.frombuffer(b"ACGT", np.uint8)[text]
    path.write_text("".join(f">r{i}\n{row.tobytes().decode()}\n" for i, row in enumerate(letters)))


# --------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """One command `python train.py …` on some GPUs, and what came of it."""

    name: str  # of its folder, unique
    workload: str
    strategy: str  # single | ddp | fsdp
    devices: int
    overrides: list[str]
    folder: Path = Path()
    gpus: list[str] = field(default_factory=list)
    process: Any = None
    begun: float = 0.0
    seconds: float = 0.0
    result: str = "not run"

    @property
    def ok(self) -> bool:
        return self.result == "ok"

    def output(self) -> Path:
        """The run's own folder.

        Raises:
            FileNotFoundError: none, or several.
        """
        found = [f for f in self.folder.glob("*/runs/*") if f.is_dir()]
        if len(found) != 1:
            raise FileNotFoundError(f"{self.name}: expected one output folder, got {len(found)}")
        return found[0]

    def logged(self, column: str) -> list[tuple[int, float]]:
        """Step and value, in the order of logging; a resumed training's second file after the first."""
        rows: list[tuple[int, float]] = []
        for number in range(len(list(self.output().glob("csv/version_*")))):
            with open(self.output() / "csv" / f"version_{number}" / "metrics.csv", newline="") as file:
                rows += [(int(r["step"]), float(r[column])) for r in csv.DictReader(file) if r.get(column)]
        return rows


class Host:
    """Runs commands on GPUs that are free, several at a time or one alone; keeps what failed."""

    def __init__(self, gpus: list[str], a: argparse.Namespace, work: Path, failed: Path) -> None:
        self.gpus, self.cpu, self.work, self.failed = gpus, a.device == "cpu", work, failed
        self.timeout, self.end = a.timeout, time.monotonic() + 60 * a.minutes
        failed.unlink(missing_ok=True)

    def run(self, runs: Iterable[Run], alone: bool = False) -> None:
        """All of them; `alone`: one at a time. What the budget of time has no room for is left out."""
        waiting, going, free = list(runs), [], list(self.gpus)
        while waiting or going:
            for run in list(waiting):
                if time.monotonic() > self.end:
                    waiting.remove(run)
                    run.result = "left out: no time"
                elif run.devices <= len(free) and not (alone and going):
                    waiting.remove(run)
                    run.gpus, free = free[: run.devices], free[run.devices :]
                    self._start(run)
                    going.append(run)
            for run in list(going):
                late = time.monotonic() - run.begun > self.timeout
                if run.process.poll() is None and not late:
                    continue
                self._end(run, late and run.process.poll() is None)
                going.remove(run)
                free = sorted(free + run.gpus)
            time.sleep(0.1)

    def _start(self, run: Run) -> None:
        run.folder = run.folder if run.folder != Path() else self.work / run.name
        run.folder.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "HYDRA_FULL_ERROR": "1"}
        env |= {"PYTHONFAULTHANDLER": "1", "NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN")}
        where = ["trainer.accelerator=cpu"] if self.cpu else ["trainer.accelerator=gpu", "trainer.precision=bf16-mixed"]
        if self.cpu:
            env["OMP_NUM_THREADS"] = "1"
        else:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(run.gpus)
        command = ["train.py", *run.overrides, f"trainer.devices={run.devices}", *where]
        print(f"{run.name}: python {' '.join(command)}", flush=True)
        with open(self._log(run), "w") as log:  # a group of its own: the other processes of the run end with it
            run.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
            )
        run.begun = time.monotonic()

    def _end(self, run: Run, late: bool) -> None:
        if late:
            _signal(run.process.pid, signal.SIGABRT)  # each process prints where it stands
            time.sleep(2)
        _signal(run.process.pid, signal.SIGKILL)
        code = run.process.wait()
        run.seconds = time.monotonic() - run.begun
        run.result = f"timeout ({self.timeout:g} s)" if late else "ok" if code == 0 else f"failed ({code})"
        print(f"{run.name}: {run.result} after {run.seconds:.0f} s", flush=True)
        if not run.ok:
            lines = self._log(run).read_text(errors="replace").splitlines()
            print("\n".join(lines[-30:]), flush=True)
            with self.failed.open("a") as file:
                file.write(f"===== {run.name}: {run.result}\n" + "\n".join(lines[-300:]) + "\n")

    def _log(self, run: Run) -> Path:
        return self.work / f"{run.name}.log"


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(group, number)


# -------------------------------------------------------------------------------------------------------------- parts


class Benchmark:
    """The runs of all parts, and the rows of the table that follow from them."""

    def __init__(self, a: argparse.Namespace, host: Host, work: Path, known: dict[str, Workload]) -> None:
        self.a, self.host, self.work = a, host, work
        self.known = {name: known[name] for name in a.workloads}
        self.most = max(a.devices)
        self.rows: list[dict[str, Any]] = []
        self.points: dict[tuple[str, str], list[tuple[int, float]]] = {}  # curves

    def make(self, part: str, workload: str, strategy: str, devices: int, *extra: str, kind: str = "") -> Run:
        name = "_".join(n for n in (part, workload, strategy, str(devices), kind) if n)
        overrides = [*self.known[workload].overrides, *COMMON, *extra, f"paths.log_dir={self.work / name}"]
        trainer = "default" if strategy == "single" else strategy
        return Run(name, workload, strategy, devices, [*overrides, f"trainer={trainer}"])

    def row(self, part: str, run: Run, label: str, **values: Any) -> None:
        row = {"part": part, "workload": run.workload, "run": label, "GPUs": run.devices, "result": run.result}
        self.rows.append(row | {"seconds": run.seconds} | values)
        write_rows(self.a.out / "scaling.csv", COLUMNS, self.rows)

    def several(self) -> list[tuple[str, int]]:
        return [(s, n) for n in sorted(self.a.devices, reverse=True) if n > 1 for s in self.a.strategies]

    def curves(self) -> None:
        runs: dict[tuple[str, str], Run] = {}
        for name, w in self.known.items():
            steps = [f"trainer.max_epochs={w.points}", f"trainer.check_val_every_n_epoch={w.points}"]
            steps += [f"callbacks.model_checkpoint.every_n_epochs={w.points}", f"trainer.log_every_n_steps={EPOCH}"]
            steps += ["callbacks.learning_curves=null", *w.still]
            whole = [f"data.batch_size={w.batch}", f"trainer.limit_train_batches={EPOCH}", *steps]
            halves = [f"data.batch_size={w.batch // 2}", f"trainer.limit_train_batches={2 * EPOCH}", *steps]
            runs[name, "single"] = self.make("curves", name, "single", 1, *whole, "test=false")
            for strategy, n in self.several():
                extra = [f"data.batch_size={w.batch // n}", f"trainer.limit_train_batches={EPOCH}", *steps]
                checked = "checks" in self.a.parts and n == self.most
                extra += ["logger=many_loggers"] if checked else ["test=false"]
                runs[name, f"{strategy} {n}"] = self.make("curves", name, strategy, n, *extra)
            runs[name, "single, 2 half batches"] = self.make(
                "curves", name, "single", 1, *halves, "test=false", "trainer.accumulate_grad_batches=2", kind="halves"
            )
        # The largest first: they leave no gaps
        self.host.run(sorted(runs.values(), key=lambda r: -r.devices))
        self.points = {key: self._logged(run, "train/loss") for key, run in runs.items()}
        for (name, label), run in runs.items():
            self.row("curves", run, label, **differences(self.points[name, label], self.points[name, "single"]))
        write_curves(self.a.out / "scaling_curves.csv", self.points)
        if "checks" in self.a.parts:
            self.checks([run for run in runs.values() if run.devices == self.most > 1])

    def _logged(self, run: Run, column: str) -> list[tuple[int, float]]:
        """Nothing of a run that failed, or that left nothing."""
        if not run.ok:
            return []
        try:
            return run.logged(column)
        except (OSError, KeyError, ValueError) as error:
            run.result = f"unreadable: {error}"
            return []

    def checks(self, trained: list[Run]) -> None:
        trained = [run for run in trained if run.ok]
        for run in trained:
            self.row("checks", run, f"{run.strategy}: one folder", result=one_folder(run, self.known[run.workload]))
        tests = [self._again(run, "test", 1, "stage=test", "best") for run in trained]
        self.host.run(tests)
        for run, test in zip(trained, tests, strict=True):
            result = same_test(run, test) if test.ok else test.result
            self.row("checks", test, f"{run.strategy}: test of {run.devices} by 1", result=result)
        fewer = max((n for n in self.a.devices if n < self.most), default=1)
        goals = {run.name: self.known[run.workload].points + 2 for run in trained}
        resumed = [
            self._again(
                run,
                "resume",
                fewer,
                f"data.batch_size={self.known[run.workload].batch // fewer}",
                "last",
                f"trainer.max_epochs={goals[run.name]}",
                "trainer.check_val_every_n_epoch=1",
                "callbacks.model_checkpoint.every_n_epochs=1",
                "test=false",
            )
            for run in trained
        ]
        self.host.run(resumed)
        for run, more in zip(trained, resumed, strict=True):
            result = goes_on(run, self.known[run.workload].points * EPOCH) if more.ok else more.result
            self.row("checks", more, f"{run.strategy}: {run.devices} resumed on {fewer}", result=result)

    def _again(self, run: Run, kind: str, devices: int, first: str, checkpoint: str, *extra: str) -> Run:
        """A command on a checkpoint of a run: its configuration comes with it."""
        path = run.output() / "checkpoints" / f"{checkpoint}.ckpt"
        strategy = "single" if devices == 1 else run.strategy
        options = [f"ckpt_path={path}", first, *extra, "extras.print_config=false"]
        if devices == 1:
            options.append("trainer.strategy=auto")
        again = Run(f"{kind}_{run.name}", run.workload, strategy, devices, options)
        again.folder = run.folder
        return again

    def throughput(self) -> None:
        runs: dict[tuple[str, str, int], Run] = {}
        variants: dict[str, list[str]] = {}
        for variant, override in self.a.variant:
            variants.setdefault(variant, []).append(override)
        for mode in ("", "graph", *variants):
            for name, w in self.known.items():
                if mode == "graph" and (name != "patches" or self.a.no_graph):
                    continue
                for strategy, n in [("single", 1), *reversed(self.several())]:
                    if (mode and strategy not in ("single", strategy_of(mode))) or (
                        mode in variants and strategy == "single"
                    ):
                        continue
                    extra = [f"data.batch_size={w.batch}", f"trainer.max_steps={w.steps}", "test=false"]
                    extra += [f"trainer.limit_train_batches={w.per_epoch}", "trainer.max_epochs=1000"]
                    extra += [f"trainer.log_every_n_steps={w.per_epoch}", "trainer.limit_val_batches=0"]
                    extra += ["callbacks.model_checkpoint=null", "callbacks.learning_curves=null"]
                    if mode == "graph":
                        extra += ["task.compile=true", "task.compile_options.mode=reduce-overhead"]
                    elif mode:
                        extra += variants[mode]
                    runs[name, f"{strategy} {mode}".strip(), n] = self.make(
                        "throughput", name, strategy, n, *extra, kind=mode
                    )
        runs = {key: run for key, run in runs.items() if not re.search(self.a.without, run.name)}
        few = [key for key in runs if self.a.beside and key[2] < self.most]
        for keys in (few, *([key] for key in runs if key not in few)):
            self.host.run([runs[key] for key in keys], alone=keys is not few)
            for name, label, n in keys:
                base = runs.get((name, "single graph" if label.endswith(" graph") else "single", 1))
                rate, alone = self._rate(runs[name, label, n]), base and self._rate(base)
                efficiency = rate / (n * alone) if rate and alone else None
                self.row("throughput", runs[name, label, n], label, **{"samples/s": rate, "efficiency": efficiency})

    def _rate(self, run: Run) -> float | None:
        """Samples a second over all GPUs, the median after the first two stretches."""
        rates = self._logged(run, "performance/samples_per_second")[2:]
        return statistics.median(value for _, value in rates) if rates else None


def strategy_of(mode: str) -> str:
    """Of the runs that a mode ("graph" or the name of a variant) is added to."""
    return "fsdp" if mode.startswith("fsdp") else "ddp"


def differences(curve: list[tuple[int, float]], base: list[tuple[int, float]]) -> dict[str, Any]:
    if not curve or len(curve) != len(base):
        return {}
    apart = [abs(x[1] - y[1]) for x, y in zip(curve, base, strict=True)]
    return {"last loss": curve[-1][1], "max diff": max(apart), "mean diff": statistics.mean(apart)}


def one_folder(run: Run, workload: Workload) -> str:
    """`ok`, or what is there once too often or not at all."""
    try:
        folder = run.output()
    except FileNotFoundError as error:
        return str(error)
    wanted = {"config*.yaml": 1, "metrics.json": 1, "wandb/offline-run-*": 1, "csv/version_*": 1}
    wanted["predictions.parquet"] = int(workload.table)
    found = {pattern: len(list(folder.glob(pattern))) for pattern in wanted}
    wrong = [f"{found[p]} {p} instead of {n}" for p, n in wanted.items() if found[p] != n]
    return ", ".join(wrong) or "ok"


def same_test(run: Run, test: Run) -> str:
    """`ok` with the largest difference of a test metric, or the metrics that differ."""
    folders = list((run.output() / "test").iterdir())
    if len(folders) != 1:
        return f"{len(folders)} folders of tests"
    one, several = (json.loads((f / "metrics.json").read_text()) for f in (folders[0], run.output()))
    apart = {k.removeprefix("test/"): abs(one[k] - several[k]) for k in several if k.startswith("test/")}
    rounded = ("loss", "perplexity", "auroc", "average_precision", "calibration_error")
    wrong = [f"{k} {v:.2g}" for k, v in apart.items() if not v <= (1e-3 if k in rounded else 1e-6)]
    if not apart:
        return "no test metrics"
    return f"differ: {', '.join(wrong)}" if wrong else f"ok, largest {max(apart.values()):.1g}"


def goes_on(run: Run, steps: int) -> str:
    """`ok` with the losses on both sides of the interruption, or what is wrong."""
    rows = run.logged("train/loss")
    before = [value for step, value in rows if step < steps]
    after = [value for step, value in rows if step >= steps]
    if not before or len(after) != 2 or rows[-1][0] + 1 != steps + 2 * EPOCH:
        return f"expected steps up to {steps + 2 * EPOCH}, got {[step + 1 for step, _ in rows[-4:]]}"
    text = f"loss {before[-1]:.4g}, then {after[0]:.4g}"
    return f"ok, {text}" if abs(after[0] - before[-1]) <= 0.1 * before[-1] else f"jumps: {text}"


# ------------------------------------------------------------------------------------------------------------- output


def write_rows(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_curves(path: Path, points: dict[tuple[str, str], list[tuple[int, float]]]) -> None:
    rows = [
        {"workload": name, "run": label, "step": step, "train/loss": value}
        for (name, label), curve in points.items()
        for step, value in curve
    ]
    write_rows(path, ["workload", "run", "step", "train/loss"], rows)


def draw(path: Path, bench: Benchmark, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(r["workload"], r["run"], r["GPUs"], r["efficiency"]) for r in bench.rows if r.get("efficiency")]
    drawn = [name for name in bench.known if any(key[0] == name and curve for key, curve in bench.points.items())]
    panels = len(drawn) + bool(bars)
    if not panels:
        return
    figure, (axes,) = plt.subplots(1, panels, figsize=(5 * panels, 4), squeeze=False)
    for axis, workload in zip(axes, drawn, strict=False):
        for (name, label), curve in bench.points.items():
            if name == workload and curve:
                axis.plot(*zip(*curve, strict=True), label=label, linewidth=1, alpha=0.7)
        axis.set_title(f"{workload}: one global batch", fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylabel("train/loss")
        axis.legend(fontsize=6)
    if bars:
        axes[-1].bar(range(len(bars)), [bar[3] for bar in bars])
        axes[-1].set_xticks(range(len(bars)), [f"{w}\n{r} {n}" for w, r, n, _ in bars], rotation=90, fontsize=6)
        axes[-1].axhline(1, color="black", linewidth=0.5)
        axes[-1].set_title("efficiency, one batch a GPU", fontsize=9)
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def show(rows: list[dict[str, Any]], title: str) -> None:
    print(f"\n{title}\n" + " | ".join(COLUMNS))
    for row in rows:
        values = [row.get(column) for column in COLUMNS]
        print(" | ".join("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--devices", type=int, nargs="+", help="numbers of GPUs; default: 1, 2, 4, … up to those there")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="checks come with curves")
    parser.add_argument("--workloads", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    parser.add_argument("--strategies", choices=STRATEGIES, nargs="+", default=list(STRATEGIES))
    parser.add_argument("--cifar", help="folder of CIFAR-10's train.parquet and test.parquet")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of the runs; default: a temporary one, deleted at the end")
    parser.add_argument("--timeout", type=float, default=150, help="seconds of one run")
    parser.add_argument("--minutes", type=float, default=60, help="no run begins after so many")
    parser.add_argument("--beside", action="store_true", help="throughput: runs that leave GPUs free go side by side")
    parser.add_argument("--without", default="$.", help="throughput: leave out runs whose name this pattern finds")
    parser.add_argument(
        "--variant",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "OVERRIDE"),
        help="throughput: DDP (a NAME of fsdp…: FSDP) with it, too",
    )
    parser.add_argument("--no-graph", action="store_true", help="leave out torch.compile")
    parser.add_argument("--tiny", action="store_true", help="a network, data and numbers of steps for a CPU")
    a = parser.parse_args(given)
    there = 2 if a.device == "cpu" else torch.cuda.device_count()
    a.devices = sorted(set(a.devices or [n for n in (1, 2, 4, 8) if n <= there]))
    if a.devices[-1] > there and a.device == "cuda":
        parser.error(f"--devices: expected at most {there}, which are there, got {a.devices[-1]}")
    if "checks" in a.parts and "curves" not in a.parts:
        parser.error("--parts checks: expected curves too, whose runs are checked")
    if wrong := [name for name, _ in a.variant if name == "graph" or not re.fullmatch(r"\w+", name)]:
        parser.error(f"--variant: expected a name of letters, digits and _ other than graph, got {wrong[0]!r}")
    if missing := sorted({strategy_of(name) for name, _ in a.variant} - set(a.strategies)):
        parser.error(f"--variant: expected --strategies {' '.join(missing)}, whose runs it adds to")
    if "patches" in a.workloads and not (a.tiny or a.cifar):
        parser.error("--cifar: expected a folder for the workload patches")
    a.cifar = a.cifar and str(Path(a.cifar).resolve())
    a.no_graph = a.no_graph or a.device == "cpu"
    a.out = a.out.resolve()
    return a


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    a = arguments(given)
    a.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scaling_") as temporary:
        work = (a.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        genome = work / "genome.fa"
        if set(a.workloads) - {"patches"}:
            write_genome(genome, 512 if a.tiny else 1024, 256 if a.tiny else 16384)
        gpus = visible() if a.device == "cuda" else [str(n) for n in range(max(a.devices))]
        bench = Benchmark(a, Host(gpus, a, work, a.out / "scaling_failed.txt"), work, workloads(a, genome))
        for part in ("curves", "throughput"):
            if part in a.parts:
                getattr(bench, part)()
    title = f"{len(gpus)} x {hardware(a.device)}"
    draw(a.out / "scaling.png", bench, title)
    show(bench.rows, title)
    print(f"written: {a.out}/scaling.csv, scaling.png and, of curves, scaling_curves.csv")
    return bench.rows


def visible() -> list[str]:
    """Numbers, or identifiers, of the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]


if __name__ == "__main__":
    main()
