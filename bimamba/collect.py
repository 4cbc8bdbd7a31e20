"""Many runs to one table: mean, standard deviation, range and a bootstrap confidence interval of each setting.

    python -m bimamba.collect logs/digits/multiruns/2026-01-31_12-00-00 --metric test/accuracy

Runs whose configurations differ in nothing but seed and fold are repetitions of one setting; settings are named by what
differs between them. Writes `runs.csv`, `table.csv`, `table.md` and a plot a metric.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from bimamba.files import beneath

REPEATED = ("seed", "data.seed", "data.fold")
# Sections and keys that change nothing in what a run learns and measures.
IGNORED: tuple[str, ...] = (
    *("paths", "logger", "extras", "hydra", "explain", "export", "tags", "ckpt_path", "stage", "test"),
    "optimized_metric",
    "trainer.default_root_dir",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    *("data.num_workers", "data.pin_memory", "data.persistent_workers", "data.prefetch_factor"),
)


@dataclass
class Run:
    """A finished run: its folder, its resolved configuration with dotted keys, and its last metrics."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, float]

    @property
    def repetition(self) -> tuple[Any, ...]:
        """Seed and fold."""
        return tuple(self.config.get(key) for key in REPEATED)


@dataclass
class Summary:
    """One setting's values of one metric; `low`, `high` bound the mean's 95 % interval, NaN for a single run."""

    setting: str
    metric: str
    values: np.ndarray
    low: float
    high: float

    @property
    def deviation(self) -> float:
        """Sample standard deviation (n - 1); NaN for a single run."""
        return float(self.values.std(ddof=1)) if len(self.values) > 1 else float("nan")


# ------------------------------------------------------------------------------------------------------------ reading


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The finished trainings in and beneath folders, by folder name, and remarks on what was left out.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no finished training in any of them.
    """
    runs, unfinished, other = {}, [], {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"expected a folder with runs, got {folder} (no such folder)")
        for path in beneath(folder, "config.yaml"):
            if ".hydra" in path.parts:
                continue
            run = path.parent.resolve()
            # a resumed training writes its configuration beside the first
            newest = max(run.glob("config_*.yaml"), default=path)
            config = flatten(in_use(OmegaConf.to_container(OmegaConf.load(newest), resolve=False)))
            if config.get("stage", "fit") != "fit":
                other[config["stage"]] = other.get(config["stage"], 0) + 1
            elif not (run / "metrics.json").is_file():
                unfinished.append(str(path.parent))
            else:
                runs[run] = Run(path.parent, config, _metrics(run / "metrics.json"))
    notes = [f"left out, not finished: {', '.join(unfinished)}"] if unfinished else []
    if not runs:
        found = [f"{n} of stage {stage}" for stage, n in other.items()] + [f"{len(unfinished)} not finished"]
        what = f"there are {', '.join(found)}" if other or unfinished else "there is no config.yaml of a run"
        raise ValueError(f"no finished training in {', '.join(map(str, folders))}: {what}")
    return list(runs.values()), notes


def _metrics(path: Path) -> dict[str, float]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run it again, or move its folder away") from error


def in_use(config: Any) -> dict[str, Any]:
    """A run's configuration without options of what it left off: those of `task.distill`, where there is no teacher."""
    task = config.get("task") or {}
    if (task.get("distill") or {}).get("teachers"):
        return config
    return {**config, "task": {key: value for key, value in task.items() if key != "distill"}}


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested dicts; lists are values."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    out: dict[str, Any] = {}
    for key, value in node.items():
        out |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out


# ----------------------------------------------------------------------------------------------------------- grouping


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Keys whose values differ between runs, less repetition, bookkeeping and what names the runs' own folders."""

    def shown(run: Run, key: str) -> str:
        value = run.config.get(key, "–")
        own = run.config.get("paths.output_dir")
        if own and isinstance(value, str) and value.startswith(str(own)):
            return f"<run>{value[len(own) :]}"
        return repr(value)

    found = dict.fromkeys(key for run in runs for key in run.config)
    keys = [k for k in found if k not in REPEATED + IGNORED and k.split(".")[0] not in IGNORED]
    return [k for k in keys if len({shown(run, k) for run in runs}) > 1]


def settings(runs: Sequence[Run], by: Sequence[str] | None = None) -> tuple[dict[str, list[Run]], list[str]]:
    """Runs by their setting's name, and remarks.

    Args:
        by: keys that make a setting; None: all that differ. Of keys that always change together one gives the name.

    Raises:
        ValueError: an unknown key, or runs of several experiments without `by` saying that this is meant.
    """
    known = dict.fromkeys(key for run in runs for key in run.config)
    if unknown := [key for key in by or () if key not in known]:
        raise ValueError(f"--by {unknown[0]}: no such key in the runs' configurations, e.g. model.depth")
    names = sorted({str(run.config.get("task_name")) for run in runs})
    if len(names) > 1 and "task_name" not in (by or ()):
        raise ValueError(
            f"mixed experiments, {', '.join(names)}: their figures do not compare; give the folder of one, or say "
            "--by task_name"
        )
    differing, notes = differing_keys(runs), []
    if by is None:
        chosen, also = _one_key_a_partition(runs, differing)
        notes += [f"{key} stands for what changes with it: {_some(others)}" for key, others in also.items()]
    else:
        chosen = list(by)
        if rest := [k for k in differing if k not in by]:
            notes.append(f"within a setting these differ too: {_some(rest)}")
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda r: [_order(r.config.get(k)) for k in chosen]):
        name = ", ".join(f"{_short_key(k, chosen)}={_short_value(run.config.get(k, '–'))}" for k in chosen)
        groups.setdefault(name or str(run.config.get("task_name", "all runs")), []).append(run)
    return {name: _without_repeats(name, group, notes, by is not None) for name, group in groups.items()}, notes


def _one_key_a_partition(runs: Sequence[Run], keys: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Of keys that split the runs alike, the one that says most: a `_target_`, else the shortest."""
    partitions: dict[tuple[int, ...], list[str]] = {}
    for key in keys:
        values = [repr(run.config.get(key, "–")) for run in runs]
        partitions.setdefault(tuple(values.index(v) for v in values), []).append(key)
    chosen, also = [], {}
    for group in partitions.values():
        first = min(group, key=lambda k: (not k.endswith("_target_"), k.count("."), len(k)))
        chosen.append(first)
        if len(group) > 1:
            also[first] = [k for k in group if k != first]
    return chosen, also


def _without_repeats(name: str, group: list[Run], notes: list[str], mixed: bool) -> list[Run]:
    """One run a seed and fold: the same run twice is not two independent ones. The newest counts."""
    if mixed:
        return group
    kept: dict[Any, Run] = {}
    for run in sorted(group, key=lambda r: (r.folder / "metrics.json").stat().st_mtime_ns):
        key: Any = run.repetition if run.config.get("seed") is not None else run.folder
        if key in kept:
            notes.append(f"{name}: same seed and fold twice, {kept[key].folder} is left out for {run.folder}")
        kept[key] = run
    return sorted(kept.values(), key=lambda r: [_order(v) for v in r.repetition])


def _some(keys: Sequence[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _order(value: Any) -> tuple[int, Any]:
    number = isinstance(value, int | float)
    return (0, value) if number else (1, str(value))


def _short_key(key: str, keys: Sequence[str]) -> str:
    """The shortest end of a key that no other chosen key has; `mixer` for `model.mixer._target_`."""
    parts = key.removesuffix("._target_").split(".")
    others = [k.removesuffix("._target_").split(".") for k in keys if k != key]
    for n in range(1, len(parts)):
        if all(o[-n:] != parts[-n:] for o in others):
            return ".".join(parts[-n:])
    return ".".join(parts)


def _short_value(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.rsplit(".", 1)[-1] if text.startswith(("bimamba.", "torch.", "lightning.")) else text


# -------------------------------------------------------------------------------------------------------- summarising


def bootstrap_mean(
    values: np.ndarray, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979); NaN for fewer than two values.

    With few values it is too narrow (three seeds: about the range of the means of three draws): say n beside it.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def default_metric(runs: Sequence[Run]) -> str:
    """The test figure of what the runs monitored; without a test that figure itself."""
    monitor = str(runs[0].config.get("monitor", "val/loss"))
    test = f"test/{monitor.split('/', 1)[-1]}"
    return test if all(test in run.metrics for run in runs) else monitor


def summarise(
    groups: Mapping[str, Sequence[Run]], metrics: Sequence[str], resamples: int = 10_000, seed: int = 0
) -> list[Summary]:
    """A summary a metric and setting.

    Raises:
        ValueError: a run lacks a metric, or has it as NaN; names runs and the metrics that all have.
    """
    runs = [run for group in groups.values() for run in group]
    for metric in metrics:
        bad = [run for run in runs if not np.isfinite(run.metrics.get(metric, float("nan")))]
        if bad:
            common = sorted(set.intersection(*(set(run.metrics) for run in runs)))
            raise ValueError(
                f"{metric}: {len(bad)} of {len(runs)} runs have no such number, e.g. {bad[0].folder}; all have "
                f"{', '.join(common) or 'none in common'}"
            )
    out = []
    for metric in metrics:
        for name, group in groups.items():
            values = np.array([run.metrics[metric] for run in group])
            out.append(Summary(name, metric, values, *bootstrap_mean(values, resamples=resamples, seed=seed)))
    return out


# ------------------------------------------------------------------------------------------------------------ writing


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.4f}"


def markdown(summaries: Sequence[Summary]) -> str:
    """The table as Markdown."""
    lines = [
        "| setting | metric | n | mean ± sd | min – max | 95 % interval of the mean |",
        "|---|---|---|---|---|---|",
    ]
    for s in summaries:
        mean, v = f"{_number(s.values.mean())} ± {_number(s.deviation)}", s.values
        interval = "–" if np.isnan(s.low) else f"{_number(s.low)} – {_number(s.high)}"
        lines.append(
            f"| {s.setting} | {s.metric} | {len(v)} | {mean} | {_number(v.min())} – {_number(v.max())} | {interval} |"
        )
    return "\n".join(lines) + "\n"


def write(folder: Path, groups: Mapping[str, Sequence[Run]], summaries: Sequence[Summary]) -> None:
    """`runs.csv` (every run and metric), `table.csv`, `table.md`, and a plot a metric."""
    from bimamba.plots import repetitions

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(summaries))
    columns = ("setting", "metric", "n", "mean", "sd", "min", "max", "ci_low", "ci_high")
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for s in summaries:
            v = s.values
            numbers = (v.mean(), s.deviation, v.min(), v.max(), s.low, s.high)
            writer.writerow([s.setting, s.metric, len(v), *("" if np.isnan(x) else float(x) for x in numbers)])
    names = sorted({name for group in groups.values() for run in group for name in run.metrics})
    with (folder / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "folder", *REPEATED, *names])
        for setting, group in groups.items():
            for run in group:
                writer.writerow([setting, run.folder, *run.repetition, *(run.metrics.get(n, "") for n in names)])
    for metric in dict.fromkeys(s.metric for s in summaries):
        chosen = {s.setting: (s.values, s.low, s.high) for s in summaries if s.metric == metric}
        repetitions(chosen, metric).savefig(folder / f"{metric.replace('/', '_')}.png")


def main(arguments: Sequence[str] | None = None) -> list[Summary]:
    """The command.

    Raises:
        SystemExit: what was given cannot be collected; one message.
    """
    parser = argparse.ArgumentParser(prog="python -m bimamba.collect", description="Runs to a table; see the module.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold runs, at any depth")
    parser.add_argument("--metric", action="append", help="repeatable; default: the test figure of the monitored one")
    parser.add_argument("--by", action="append", help="key that makes a setting, repeatable; default: all that differ")
    parser.add_argument("--out", type=Path, help="folder of the results; default: collected/ in the first folder")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    given = parser.parse_args(arguments)
    try:
        if given.resamples < 1:
            raise ValueError(f"--resamples: expected at least 1, got {given.resamples}")
        runs, notes = find_runs(given.folders)
        groups, more = settings(runs, given.by)
        metrics = given.metric or [default_metric(runs)]
        summaries = summarise(groups, metrics, given.resamples, given.seed)
        out = given.out or given.folders[0] / "collected"
        write(out, groups, summaries)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(markdown(summaries))
    for note in notes + more:
        print(f"note: {note}")
    print(f"Written to {out}")
    return summaries


if __name__ == "__main__":
    main()
