"""Tensor descriptors: the tiles that Hopper's copy engine fetches without a mask or an address register."""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def tiles(t: Tensor | None, rows: int, columns: int, tma: bool):
    """(b, l, h, w) cut into tiles of `rows` by `columns`; needs w to be a multiple of `columns`. Without `tma`, `t`."""
    if not tma or t is None:
        return t
    b, l, h, w = t.shape
    return _descriptor(t, [b, l, h * w], [l * h * w, h * w, 1], [1, rows, columns])


def state_tiles(states: Tensor, block_p: int, block_n: int, tma: bool):
    """(b, chunks, h, directions, P2, N2) cut into `block_p` by `block_n`."""
    if not tma:
        return states
    n2 = states.shape[-1]
    return _descriptor(states, [states.numel() // n2, n2], [n2, 1], [block_p, block_n])


def row_tiles(rows: Tensor, length: int, tma: bool):
    """Lines of (b, h, sets, 3, padded l) cut into `length`."""
    if not tma:
        return rows
    padded = rows.shape[-1]
    return _descriptor(rows, [rows.numel() // padded, padded], [padded, 1], [1, length])


def _descriptor(base: Tensor, shape: list[int], strides: list[int], block_shape: list[int]) -> TensorDescriptor:
    """`TensorDescriptor(...)` without its checks, which cost the host 5 us for each of the 25 descriptors of a step:
    `choose.py` sees to the shapes, `binding.py` to the alignment."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = base, shape, strides, block_shape
    return made
