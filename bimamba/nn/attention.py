"""Multi-head self-attention as a mixer: the peer that the scan is measured against, in the same block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba.ops.backend import expect_bool


class Attention(nn.Module):
    """Self-attention by `scaled_dot_product_attention`, `(b, l, d_model)` to the same (Vaswani et al. 2017).

    Packed rows are told apart by a dense mask, bool `(rows, 1, l, l)`: of 8 rows of 16,384 tokens 2 GiB, and SDPA then
    does not run FlashAttention. torch's own ways around it are for some devices alone (its varlen attention: CUDA and
    half precision; FlexAttention: only compiled) and would need a second code path: with long rows prefer
    `data.bucket=true` to `data.packing=true` for attention. The scans have no such mask.

    Args:
        d_model: width. headdim: of one head; must divide `d_model`. bias: of the projections.
        dropout: of the attention weights, in training. causal: a token sees only those before it.

    Raises:
        ValueError: `headdim` does not divide `d_model`; in use a mask that is not bool.
    """

    def __init__(
        self, d_model: int, headdim: int = 64, bias: bool = True, dropout: float = 0.0, causal: bool = False
    ) -> None:
        super().__init__()
        if headdim < 1 or d_model % headdim:
            raise ValueError(f"headdim: expected a divisor of d_model = {d_model}, got {headdim}")
        self.headdim, self.dropout, self.causal = headdim, dropout, causal
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, u: Tensor, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """u: `(b, l, d_model)`; mask: `(b, l)` bool, False at padding; seq_idx: `(b, l)`, tokens see their equals."""
        expect_bool(mask)
        q, k, v = self.in_proj(u).unflatten(-1, (3, -1, self.headdim)).permute(2, 0, 3, 1, 4)
        keep = None
        if mask is not None:
            keep = mask[:, None, None, :]
        if seq_idx is not None:
            same = (seq_idx[:, :, None] == seq_idx[:, None, :])[:, None]
            keep = same if keep is None else keep & same
        causal = self.causal
        if causal and keep is not None:  # SDPA takes a mask or the flag
            keep, causal = keep & torch.ones(u.shape[1], u.shape[1], dtype=torch.bool, device=u.device).tril(), False
        if keep is not None:
            # A padded query may see nobody: a row without a single key gives NaN, so it sees itself.
            keep = keep | torch.eye(u.shape[1], dtype=torch.bool, device=u.device)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=keep, dropout_p=self.dropout if self.training else 0.0, is_causal=causal
        )
        return self.out_proj(y.transpose(1, 2).flatten(-2))
