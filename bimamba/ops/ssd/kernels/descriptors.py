"""How the scan's tensors are cut into the tiles that tensor descriptors fetch."""

import math

from bimamba.ops.launch import Tiles


def tiles(shape: tuple[int, int, int, int], rows: int, columns: int) -> Tiles:
    """(b, l, h, w) cut into tiles of `rows` by `columns`; needs w to be a multiple of `columns`."""
    b, l, h, w = shape
    return Tiles([b, l, h * w], [l * h * w, h * w, 1], [1, rows, columns])


def line_tiles(shape: tuple[int, ...], rows: int, columns: int) -> Tiles:
    """Lines along the last dimension, all others as one, cut into tiles of `rows` by `columns`."""
    width = shape[-1]
    return Tiles([math.prod(shape[:-1]), width], [width, 1], [rows, columns])
