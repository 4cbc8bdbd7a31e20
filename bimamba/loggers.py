"""Loggers: Weights & Biases that needs no account, and that finds its run again."""

from __future__ import annotations

import netrc
import os
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch import loggers
from lightning.pytorch.utilities.rank_zero import rank_zero_only


def _logged_in() -> bool:
    """Whether `wandb` has a key for its host: in the environment or in a netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        if name and (path := Path(name).expanduser()).is_file():
            try:
                return netrc.netrc(path).authenticators(host) is not None
            except netrc.NetrcParseError:
                return False
    return False


class WandbLogger(loggers.WandbLogger):
    """Lightning's logger, offline where nobody is logged in.

    An offline run loses nothing: `wandb sync <run folder>/wandb/offline-run-*` uploads it later. The run's id is kept
    in `<save_dir>/wandb/run_id`, so a training resumed in the same folder continues the same W&B run.

    Args:
        save_dir: the run's folder.
        mode: `online`, `offline`, `disabled`, `shared`, or None: `WANDB_MODE` if set, else online with an account and
            offline without.
        log_model: save the best checkpoint as an artifact at the end (True) or each one (`all`); works offline too.
        options: further arguments of `wandb.init` (project, group, tags, …).

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(
        self,
        save_dir: str,
        mode: str | None = None,
        log_model: bool | str = False,
        id: str | None = None,
        **options: Any,
    ) -> None:
        modes = ("online", "offline", "disabled", "shared")
        mode = mode or os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # names that older versions of wandb used
        if mode not in modes:
            raise ValueError(f"logger.wandb.mode: expected one of {', '.join(modes)}, or null, got {mode!r}")
        self.mode = mode
        # `offline=` of Lightning's logger would refuse log_model and set an environment variable for good.
        super().__init__(save_dir=save_dir, id=id or _run_id(Path(save_dir)), log_model=log_model, mode=mode, **options)


def _run_id(save_dir: Path) -> str:
    path = save_dir / "wandb" / "run_id"
    if path.is_file():
        return path.read_text().strip()
    run_id = secrets.token_hex(4)  # as long as W&B's own
    if rank_zero_only.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id + "\n")
    return run_id


def tensorboard(**options: Any) -> loggers.TensorBoardLogger:
    """Lightning's TensorBoard logger.

    Raises:
        ValueError: no TensorBoard package is installed.
    """
    try:
        return loggers.TensorBoardLogger(**options)
    except ModuleNotFoundError as error:
        raise ValueError("logger=tensorboard needs a package that is not here: pip install tensorboard") from error


def wandb_loggers(trainer: Any) -> list[loggers.WandbLogger]:
    """The W&B loggers of a trainer; their media functions work on rank zero only."""
    return [logger for logger in trainer.loggers if isinstance(logger, loggers.WandbLogger)]


def finish_wandb() -> None:
    """Close the W&B run of this process, so that the next job of a sweep gets a run of its own."""
    import sys

    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
