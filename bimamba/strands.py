"""The two strands of DNA: complements of letters, and sequences read on the other strand."""

from __future__ import annotations

import torch
from torch import Tensor

from bimamba.packing import Packing, mirror
from bimamba.spec import DataSpec

DNA = "ACGTN"
PAIRS = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}


def is_dna(alphabet: str) -> bool:
    """True where a reverse complement makes sense: A, C, G, T and at most one more letter for unknowns."""
    return set(alphabet) - {"N"} == set("ACGT")


def complement_tokens(alphabet: str) -> Tensor:
    """Token id of the complement of every token id, uint8 `(len(alphabet) + 1,)`; padding stays padding.

    Raises:
        ValueError: the alphabet is not DNA.
    """
    if not is_dna(alphabet):
        raise ValueError(f"a reverse complement needs a DNA alphabet ({DNA!r}), got {alphabet!r}")
    ids = [0, *(alphabet.index(PAIRS[c]) + 1 for c in alphabet)]
    return torch.tensor(ids, dtype=torch.uint8, device="cpu")  # values, also where modules are made on meta


def complements_for(option: str, spec: DataSpec) -> Tensor:
    """Complement of each token id, int64, for an option that reads both strands.

    Raises:
        ValueError: the data are no DNA sequences; names the option.
    """
    if spec.kind != "sequence":
        raise ValueError(f"{option}: expected DNA sequences, got data of kind {spec.kind!r}")
    try:
        return complement_tokens(spec.letters).long()
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def other_strand(tokens: Tensor, complement: Tensor, mask: Tensor | None, packing: Packing | None = None) -> Tensor:
    """Each sequence reversed and complemented in its place, int64 `(b, l)`; padding stays where it is, at the end.

    Args:
        tokens: ids, int64 `(b, l)`. complement: int64 of each id, see `complement_tokens`.
        mask: bool `(b, l)` or None for no padding. packing: where the sequences of packed rows lie.
    """
    return complement[turned(tokens, mask, packing)]


def turned(x: Tensor, mask: Tensor | None, packing: Packing | None = None) -> Tensor:
    """Each sequence backwards in its place: `(b, l)` or `(b, l, d)`; its own inverse."""
    source = mirror(x.shape[1], mask, packing, x.device)
    source = source.expand(x.shape[0], -1)
    return x.gather(1, source if x.dim() == 2 else source[..., None].expand(x.shape))


def both_strands(
    tokens: Tensor, complement: Tensor, mask: Tensor | None, packing: Packing | None = None
) -> tuple[Tensor, Tensor | None, Packing | None]:
    """A batch twice as large: the sequences, and behind them all their other strands, in the same order.

    Arguments as of `other_strand`; returns tokens `(2 b, l)`, mask and packing of them.
    """
    tokens = torch.cat([tokens, other_strand(tokens, complement, mask, packing)])
    if mask is not None:
        mask = torch.cat([mask, mask])
    if packing is not None:
        rows, slots = packing.bounds.shape[0], packing.bounds.shape[1] - 1
        order = torch.cat([packing.order, packing.order + rows * slots])
        packing = Packing(packing.seq_idx.repeat(2, 1), packing.bounds.repeat(2, 1), order)
    return tokens, mask, packing
