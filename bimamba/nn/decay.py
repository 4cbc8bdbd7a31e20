"""The mark of parameters that weight decay must leave alone."""

from __future__ import annotations

from torch import nn


def undecayed(module: nn.Module, *names: str) -> None:
    """Marks parameters of a module that weight decay must not touch (`bimamba.optim` reads the marks).

    The module keeps their names: copies of a parameter (`copy.deepcopy`, `to_empty`, loading with `assign=True`) lose
    its attributes. They have one all the same, Mamba's, for other optimizers.
    """
    module._undecayed = frozenset(names)  # type: ignore[assignment]  # nn.Module declares tensors and modules alone
    for name in names:
        if (parameter := getattr(module, name)) is not None:
            parameter._no_weight_decay = True
