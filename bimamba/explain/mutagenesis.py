"""In-silico mutagenesis: what every single substitution does to a score (Zhou and Troyanskaya 2015)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def mutate(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    tokens: Tensor,
    mask: Tensor,
    letters: int,
    batch_size: int,
    window: tuple[int, int],
) -> Tensor:
    """Changes of a score under all single substitutions, in batches of `batch_size` mutants.

    Args:
        score: maps token ids `(n, l)`, their mask `(n, l)` and the row `(n)` that each is a mutant of to `(n)`.
        tokens, mask: `(b, l)`, the rows to mutate.
        letters: number of letters that take part: ids 1 to `letters`.
        batch_size: rows a forward pass.
        window: first position and the one behind the last, from 0.

    Returns:
        `(b, window, letters)` float32: score of the mutant less that of the row; 0 for the own letter, NaN at
        padding.
    """
    b = len(tokens)
    start, stop = window
    change = torch.full((b, stop - start, letters), torch.nan)
    parts = torch.arange(b, device=tokens.device).split(batch_size)
    own = torch.cat([score(tokens[i], mask[i], i) for i in parts]).float().cpu()
    every = torch.arange(b), torch.arange(start, stop), torch.arange(1, letters + 1)
    rows, positions, letter = (t.flatten() for t in torch.meshgrid(*every, indexing="ij"))
    present = tokens.cpu()[rows, positions]
    real = mask.cpu()[rows, positions]
    change[rows[real], positions[real] - start, letter[real] - 1] = 0.0  # the row's own letter stays 0
    todo = torch.nonzero(real & (present != letter))[:, 0]
    for part in todo.split(batch_size):
        row, position, new = rows[part], positions[part], letter[part]
        mutant = tokens[row.to(tokens.device)].clone()
        mutant[torch.arange(len(part)), position] = new.to(mutant.device)
        got = score(mutant, mask[row.to(mask.device)], row).float().cpu()
        change[row, position - start, new - 1] = got - own[row]
    return change


def importance(change: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """How much each position's own letter counts: what the score loses on average when it is replaced.

    Args:
        change: `(…, l, letters)`, of `mutate`. tokens: `(…, l)`, ids; ids above `letters` are unknown characters.

    Returns:
        `(…, l)`; 0 at padding. Positive: the letter raises the score.
    """
    letters = change.shape[-1]
    others = np.where((tokens >= 1) & (tokens <= letters), letters - 1, letters)
    return -np.nansum(change, axis=-1) / others


def letter_heights(value: np.ndarray, tokens: np.ndarray, letters: int) -> np.ndarray:
    """Mean over rows of the importance of each letter at each position: heights of a logo.

    Args:
        value: `(b, l)`, of `importance`. tokens: `(b, l)`, aligned rows.

    Returns:
        `(l, letters)`: sum over the rows that carry the letter, over the number of all rows.
    """
    one_hot = tokens[..., None] == np.arange(1, letters + 1)
    return (value[..., None] * one_hot).mean(0)


def mean_by_name(values: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows of the first axis by the name that each carries, in the names' order."""
    column = np.asarray(names)
    return {name: values[column == name] for name in sorted(set(names))}
