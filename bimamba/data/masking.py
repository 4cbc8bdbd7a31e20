"""Masked-token modelling of DNA: which letters are hidden, and by what."""

from __future__ import annotations

import numpy as np

IGNORED = -100  # label of what is not to be predicted, as torch's cross entropy has it
STRAND, CHOICE, ACTION, LETTER = range(4)  # independent streams of random numbers


def uniform(seed: int, epoch: int, rows: np.ndarray, columns: int, stream: int) -> np.ndarray:
    """Random numbers in [0, 1) that depend on nothing but their arguments, float64 `(b, columns)`.

    So a row is masked in the same way whatever batch, loader process or device it is part of, and a resumed training
    goes on as it would have. The generator is splitmix64 (Steele, Lea and Flood 2014), used as a hash.

    Args:
        seed, epoch, stream: not negative.
        rows: int64 `(b,)`, numbers of the rows.
    """
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, stream):
        key = _mix(key ^ np.uint64(part))
    row = _mix(key ^ rows.astype(np.uint64))
    token = _mix(row[:, None] + np.arange(columns, dtype=np.uint64))
    return (token >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mask_tokens(
    tokens: np.ndarray,
    known: int,
    seed: int,
    epoch: int,
    rows: np.ndarray,
    probability: float = 0.15,
    hidden: float = 0.8,
    random: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Hides letters as BERT does (Devlin et al. 2019, arXiv:1810.04805).

    Of the letters, `probability` are to be predicted; of these, `hidden` become the unknown letter (token `known + 1`,
    which DNA has anyway: N), `random` a random known one, and the rest stay as they are, so that every visible letter
    may be one to be predicted. Unknown letters and padding are never predicted.

    Args:
        tokens: int64 `(b, l)`, 0 for padding, 1 to `known` for known letters.
        known: number of known letters.
        seed, epoch, rows: see `uniform`.

    Returns:
        Tokens to be read and labels (letter numbers from 0, or -100), int64 `(b, l)` each.
    """

    def draw(stream: int) -> np.ndarray:
        return uniform(seed, epoch, rows, tokens.shape[1], stream)

    chosen = (draw(CHOICE) < probability) & (tokens >= 1) & (tokens <= known)
    action = draw(ACTION)
    read = np.where(chosen & (action < hidden), known + 1, tokens)
    letters = 1 + (draw(LETTER) * known).astype(np.int64)
    read = np.where(chosen & (action >= hidden) & (action < hidden + random), letters, read)
    return read, np.where(chosen, tokens - 1, IGNORED)
