"""A dashboard for a project of BiMamba runs, laid out in sections. The account must allow saved views.

pip install wandb-workspaces
python -m bimamba.wandb_workspace ENTITY/PROJECT
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from bimamba.loggers import STEP

# Panels by section: (kind, title, what is shown). Where runs have no such metric, W&B leaves the panel empty.
SECTIONS: Mapping[str, Sequence[tuple[str, str, tuple[str, ...]]]] = {
    "val": (
        ("line", "loss", ("train/loss", "val/loss")),
        ("line", "accuracy", ("train/accuracy", "val/accuracy")),
        ("line", "Matthews correlation", ("val/mcc",)),
        ("line", "area under ROC", ("val/auroc",)),
        ("line", "balanced accuracy", ("val/balanced_accuracy",)),
        ("line", "calibration error", ("val/calibration_error",)),
        ("media", "confusion matrix", ("val/confusion_matrix",)),
    ),
    "test": (
        ("bar", "accuracy", ("test/accuracy",)),
        ("bar", "Matthews correlation", ("test/mcc",)),
        ("bar", "area under ROC", ("test/auroc",)),
        ("bar", "loss", ("test/loss",)),
        ("media", "pictures", ("test/confusion_matrix", "test/reliability", "test/roc_pr", "test/regression")),
    ),
    "train": (
        ("line", "loss of steps", ("train/loss_step",)),
        ("line", "learning rate", ("train/lr/decay", "train/lr/no_decay", "train/lr/hidden")),
        ("line", "gradient norm", ("train/grad_norm",)),
    ),
    "performance": (
        ("line", "samples a second", ("performance/samples_per_second",)),
        ("line", "tokens a second", ("performance/tokens_per_second",)),
    ),
    "model": (
        ("bar", "parameters", ("model/parameters", "model/trainable_parameters")),
        ("compare", "", ()),
    ),
    "samples": (("media", "examples", ("samples/val", "samples/test")),),
    "explain": (
        ("media", "scans", ("explain/scan_statistics", "explain/memory_by_head", "explain/mixing_matrices")),
        ("media", "inputs", ("explain/saliency", "explain/mutagenesis", "explain/mutagenesis_mean")),
    ),
}
OPEN = ("val", "test", "samples")


def workspace(entity: str, project: str, name: str) -> Any:
    """The view, not yet saved: a `wandb_workspaces.workspaces.Workspace`.

    Raises:
        ValueError: the package wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise ValueError("a workspace needs a package that is not here: pip install wandb-workspaces") from error

    def panel(kind: str, title: str, shown: tuple[str, ...]) -> Any:
        if kind == "line":
            return wr.LinePlot(title=title, x=STEP, y=list(shown))
        if kind == "bar":
            return wr.BarPlot(title=title, metrics=list(shown))
        if kind == "media":
            return wr.MediaBrowser(title=title, media_keys=list(shown))
        return wr.RunComparer(diff_only="split")

    sections = [
        ws.Section(name=section, panels=[panel(*p) for p in panels], is_open=section in OPEN)
        for section, panels in SECTIONS.items()
    ]
    settings = ws.WorkspaceSettings(x_axis=STEP, group_by_prefix="first")
    # runs of one experiment fold into one line of the list: repetitions stand beside each other
    runs = ws.RunsetSettings(groupby=[ws.Metric("Group")])
    # keys that no section above has thought of still show, beneath
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=settings,
        runset_settings=runs,
        auto_generate_panels=True,
    )


def main(arguments: Sequence[str] | None = None) -> str:
    """The command; returns the view's address.

    Raises:
        SystemExit: a malformed project, no package, no account, or an account that may not save views.
    """
    parser = argparse.ArgumentParser(prog="python -m bimamba.wandb_workspace", description=__doc__.split("\n")[0])
    parser.add_argument("project", help="ENTITY/PROJECT, e.g. my-lab/bimamba")
    parser.add_argument("--name", default="BiMamba", help="of the view")
    given = parser.parse_args(arguments)
    entity, _, project = given.project.partition("/")
    if not entity or not project or "/" in project:
        raise SystemExit(f"error: expected ENTITY/PROJECT, got {given.project!r}")
    import wandb

    from bimamba.loggers import logged_in

    try:
        view = workspace(entity, project, given.name)
        if not logged_in():
            raise ValueError("a workspace lies on W&B's server, and nobody is logged in: wandb login")
        view.save()
    except (ValueError, wandb.Error) as error:
        raise SystemExit(f"error: {error}") from None
    except Exception as error:  # the package raises those of its HTTP client
        raise SystemExit(f"error: W&B did not save the view ({type(error).__name__}: {error})") from None
    print(f"Workspace: {view.url}")
    return view.url


if __name__ == "__main__":
    main()
