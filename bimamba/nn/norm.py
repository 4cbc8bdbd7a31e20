"""The residual stream's norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bimamba.ops.gated_norm import rms_norm_gated


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` (Zhang and Sennrich 2019, arXiv:1910.07467), computed by this package's kernels on GPUs: on an
    H100 PyTorch's gradient of the weight alone takes longer than their whole step.

    Args:
        d: channels. cast: under autocast return autocast's dtype, that of the layer behind: one pass over the stream
            less. The stream itself stays as it is.
    """

    def __init__(self, d: int, eps: float = 1e-5, cast: bool = False) -> None:
        super().__init__(d, eps=eps)
        self.eps: float = eps
        self.cast = cast

    def forward(self, x: Tensor) -> Tensor:
        """x: `(..., d)`."""
        # Inductor joins the norm with its neighbours, and CPUs have no kernels
        if not x.is_cuda or torch.compiler.is_compiling():
            return super().forward(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if self.cast and torch.is_autocast_enabled(kind) else None
        return rms_norm_gated(x, None, self.weight, self.eps, dtype=dtype)
