"""Which number of a network's output is explained, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bimamba.spec import DataSpec


@dataclass
class Target:
    """The explained score of each row: an output's logit (regression: value), negated for a binary negative class.

    Args:
        column: int64 `(b)`, of the network's output. sign: float `(b)`, 1 or -1.
        names: what each row's score stands for.
    """

    column: Tensor
    sign: Tensor
    names: list[str]

    def score(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """`(n)` scores of logits `(n, outputs)`; `rows (n)` says which row's target each has, None: row i has i's."""
        rows = torch.arange(len(logits)) if rows is None else rows.cpu()
        column, sign = self.column[rows].to(logits.device), self.sign[rows].to(logits.device, logits.dtype)
        return logits.gather(1, column[:, None])[:, 0] * sign


def choose_target(spec: DataSpec, which: str, logits: Tensor, label: Tensor | None) -> Target:
    """The target of each row.

    Args:
        which: `predicted` (for regression the first value), `label`, or the name of a class, label or value.
        logits: `(b, outputs)`. label: of the rows, None where unknown.

    Raises:
        ValueError: an unknown name, or `label` where rows have no one label.
    """
    names, single = spec.class_names, spec.problem in ("multiclass", "binary")
    if which == "predicted":
        if spec.problem == "binary":
            chosen = (logits[:, 0] > 0).long()
        else:
            chosen = torch.zeros(len(logits)).long() if spec.problem == "regression" else logits.argmax(1)
    elif which == "label":
        if not single or label is None:
            what = f"a {spec.problem} problem" if not single else "rows without labels"
            raise ValueError(f"explain.target=label: expected one label a row, got {what}; use predicted or a name")
        chosen = label.long()
    elif which in names:
        chosen = torch.full((len(logits),), names.index(which))
    else:
        raise ValueError(f"explain.target: expected predicted, label or one of {', '.join(names)}, got {which!r}")
    chosen = chosen.cpu()
    if spec.problem == "binary":
        column, sign = torch.zeros_like(chosen), 2.0 * chosen - 1.0
    else:
        column, sign = chosen, torch.ones(len(chosen))
    return Target(column, sign, [names[k] for k in chosen.tolist()])
