"""Checkpoint files that are either whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it to the disk, and only then puts it into its place.

    Lightning's own goes through the system's temporary folder: where that is another file system, the last move is a
    copy, and a kill in its middle leaves half a checkpoint. Here the file of the same name stays as it was until the
    new one is complete, whatever happens: a kill, a full disk, a quota.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            OSError: it could not be written; says why, and what is still there.
        """
        if "://" in str(path):  # a store without renaming: fsspec's transactions are the best there is
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        part = path.with_name(f"{path.name}.part")  # one name: what a killed run left is overwritten, not piled up
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch's writer turns some of the system's errors into its own
            raise OSError(_message(path, part, error)) from error
        finally:
            part.unlink(missing_ok=True)


def _message(path: Path, part: Path, error: Exception) -> str:
    cause: BaseException = error
    while not isinstance(cause, OSError) and (cause.__context__ or cause.__cause__):
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    reason = (cause.strerror if isinstance(cause, OSError) else None) or str(cause).split("\n")[0]
    written = part.stat().st_size / 2**20 if part.exists() else 0.0
    try:
        free = f"; {shutil.disk_usage(path.parent).free / 2**20:.1f} MB are free there"
    except OSError:
        free = ""
    kept = f"The checkpoint that was there is intact: {path}" if path.exists() else "No earlier checkpoint was there."
    return f"could not write checkpoint {path}: {reason} (after {written:.1f} MB{free}). {kept}"
