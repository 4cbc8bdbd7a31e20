"""The form in which matrix units take a projection."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def aligned(u: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A linear layer's weight `(columns, d)` and bias, on GPUs with rows of zeros behind their own, so that what it
    makes of `u` has a multiple of 8 columns: matrix units want rows that begin at 16 bytes (H100, 32,768 rows of 192 to
    902 and to 904 columns: three times faster)."""
    more = -weight.shape[0] % 8
    if not (u.is_cuda and more):
        return weight, bias
    return F.pad(weight, (0, 0, 0, more)), None if bias is None else F.pad(bias, (0, more))
