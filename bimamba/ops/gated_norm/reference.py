"""The norm in PyTorch, on any device and dtype: the CPU's path, and what the kernels are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_gated_reference(
    y: Tensor, z: Tensor | None, weight: Tensor, eps: float, norm_before_gate: bool, group_size: int
) -> Tensor:
    """See `api.rms_norm_gated`."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    out = y.to(dtype)
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        out = out * gate
    out = F.rms_norm(out.unflatten(-1, (-1, group_size)), (group_size,), eps=eps).flatten(-2) * weight.to(dtype)
    if gate is not None and norm_before_gate:
        out = out * gate
    return out.to(y.dtype)
