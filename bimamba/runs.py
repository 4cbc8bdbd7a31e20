"""Folders of runs: which checkpoint is the last one, and that a folder belongs to one run at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from bimamba.files import make_folder

NAMES = ("last", "best", "auto")  # what `ckpt_path=` understands besides a file


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newer of `last.ckpt` and `interrupted.ckpt` in a run's folder of checkpoints, or None."""
    found = [p for p in (Path(folder) / "last.ckpt", Path(folder) / "interrupted.ckpt") if p.is_file()]
    return max(found, key=lambda p: p.stat().st_mtime_ns) if found else None


def find_checkpoint(name: str, log_dir: str | Path, task_name: str) -> Path | None:
    """The checkpoint that `ckpt_path=last` or `best` means: of the run of this task that was saved last.

    Args:
        name: `last` (the newest state) or `best`.
        log_dir, task_name: runs lie in `<log_dir>/<task_name>/runs/*` and `…/multiruns/*/*`.

    Returns:
        Its path, or None where no run has one.
    """
    task = Path(log_dir) / task_name
    last = [newest_checkpoint(f) for f in (*task.glob("runs/*/checkpoints"), *task.glob("multiruns/*/*/checkpoints"))]
    newest = max((p for p in last if p), key=lambda p: p.stat().st_mtime_ns, default=None)
    if newest is None or name == "last":
        return newest
    best = newest.with_name("best.ckpt")
    return best if best.is_file() else None


def locate(ckpt_path: str | None, log_dir: str | Path, task_name: str, output_dir: str | Path) -> str | None:
    """The checkpoint's path for what was given as `ckpt_path`.

    Args:
        ckpt_path: a path, None, or a name: `last` and `best` of the newest run (see `find_checkpoint`), or `auto`: the
            newest checkpoint in `output_dir` where there is one, else None, which is a new training: for jobs that a
            scheduler may start again by the same command.
        log_dir, task_name, output_dir: of this run.

    Raises:
        FileNotFoundError: no run of this task has such a checkpoint; names the tasks that have.
    """
    if ckpt_path not in NAMES:
        return ckpt_path
    if ckpt_path == "auto":
        found = newest_checkpoint(Path(output_dir) / "checkpoints")
    else:
        found = find_checkpoint(ckpt_path, log_dir, task_name)
        if found is None:
            raise FileNotFoundError(
                f"ckpt_path={ckpt_path}: expected a run with checkpoints in {Path(log_dir) / task_name}, found none"
                f"{_other_tasks(ckpt_path, Path(log_dir))}"
            )
    _say(f"ckpt_path={ckpt_path}: {found or 'nothing to go on from; a new training'}")
    return str(found) if found else None


def _other_tasks(name: str, log_dir: Path) -> str:
    tasks = sorted(p.name for p in log_dir.glob("*") if p.is_dir() and find_checkpoint(name, log_dir, p.name))
    return f"; there are runs of {', '.join(tasks)} (experiment=… or task_name=… chooses)" if tasks else ""


def quoted(path: str | Path) -> str:
    """The path as Hydra's grammar and a shell read it."""
    text = str(path)
    return text if all(c.isalnum() or c in "/._-:%@" for c in text) else f"'\"{text}\"'"


@contextmanager
def claimed(output_dir: str | Path, fresh: bool, stage: str = "fit") -> Iterator[None]:
    """Hold a run's folder for this process; a lock of the system, so a killed run leaves nothing to clean up.

    The first process of several holds it for all.

    Args:
        output_dir: the run's folder.
        fresh: a new training begins, which must not find another one's checkpoints.
        stage: an evaluation must not find a training either: its figures would take the place of that one's.

    Raises:
        ValueError: another run writes there at this moment, there are checkpoints and must not be, or there can be no
            such folder.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    output_dir = Path(output_dir)
    make_folder(output_dir, "paths.output_dir")
    owner, lock = output_dir / ".run", FileLock(output_dir / ".run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = f" ({owner.read_text().strip()})" if owner.is_file() else ""
        raise ValueError(
            f"another run is writing to {output_dir}{who}: wait for its end, or give this one a folder of its own "
            "(hydra.run.dir=…)"
        ) from None
    try:
        there = newest_checkpoint(output_dir / "checkpoints")
        if fresh and there:
            raise ValueError(
                f"{output_dir} holds the checkpoints of another training: go on with it "
                f"(ckpt_path={quoted(there)}), or give this one a folder of its own (hydra.run.dir=…)"
            )
        if stage != "fit" and any((output_dir / "checkpoints").glob("*.ckpt")):
            raise ValueError(
                f"{output_dir} holds a training, whose metrics and predictions stage={stage} would overwrite: leave "
                f"hydra.run.dir out, which gives {Path(stage, 'DATE_TIME')} beneath the checkpoint's run, or choose "
                "another folder"
            )
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@rank_zero_only
def _say(message: str) -> None:
    print(message, flush=True)
