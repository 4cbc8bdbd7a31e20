"""The mark of parameters that weight decay must leave alone."""

from __future__ import annotations

from torch import nn


def undecayed(parameter: nn.Parameter) -> nn.Parameter:
    """Marks a parameter that weight decay must not touch (`bimamba.optim` reads the mark)."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]  # torch lets parameters carry attributes
    return parameter
