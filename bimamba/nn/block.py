"""The pre-norm residual block: mixer over tokens, then optionally an MLP or a channel mixer over channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba.nn.channel_mixer import ChannelMixer
from bimamba.nn.norm import RMSNorm
from bimamba.nn.powers import DepthwisePowersConv1d


class DropPath(nn.Module):
    """Stochastic depth: drops the residual branch of samples in training (Huang et al. 2016, arXiv:1603.09382).

    The sequences of a packed row (`seq_idx`, ids from 0 to l - 1) are drawn by themselves.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop_path: expected a rate in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        if seq_idx is not None:
            drawn = x.new_empty(x.shape[:2]).bernoulli_(keep).div_(keep)
            return x * drawn.gather(1, seq_idx.long())[..., None]
        return x * x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class LayerScale(nn.Module):
    """A learned factor a channel on the residual branch, small at the start (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, d_model: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MLP(nn.Module):
    """Two layers over the channels: "gelu", or "swiglu" (Shazeer 2020, arXiv:2002.05202) of 2/3 of the width.

    Args:
        d_model: width. ratio: hidden width over it. kind: "gelu" or "swiglu". dropout: of the hidden channels.
        reach: how far the hidden channels (of swiglu: the gate's, as in the ConvGLU of Shi 2023, arXiv:2311.17132) look
            to both sides, by `DepthwisePowersConv1d`; 0: not at all.
    """

    def __init__(
        self, d_model: int, ratio: float = 4.0, kind: str = "swiglu", dropout: float = 0.0, reach: int = 0
    ) -> None:
        super().__init__()
        if reach < 0:
            raise ValueError(f"mlp_reach: expected 0 or more, got {reach}")
        if kind not in ("gelu", "swiglu"):
            raise ValueError(f"mlp: expected 'gelu', 'swiglu' or 'channel_mixer', got {kind!r}")
        self.gated = kind == "swiglu"
        hidden = int(ratio * d_model)
        if self.gated:
            hidden = max(8, round(hidden * 2 / 3 / 8) * 8)
        self.in_proj = nn.Linear(d_model, hidden * (2 if self.gated else 1))
        self.out_proj = nn.Linear(hidden, d_model)
        self.dropout = nn.Dropout(dropout)
        self.conv = DepthwisePowersConv1d(hidden, reach) if reach else None

    def forward(self, x: Tensor, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """x: `(b, l, d_model)`; mask and seq_idx matter to a convolution alone."""
        gate, *rest = self.in_proj(x).chunk(2 if self.gated else 1, dim=-1)
        if self.conv is not None:
            gate = self.conv(gate, mask, seq_idx)
        x = F.silu(gate) * rest[0] if self.gated else F.gelu(gate)
        return self.out_proj(self.dropout(x))


class Block(nn.Module):
    """`x = x + mixer(norm(x))`, then `x = x + mlp(norm(x))` if there is an MLP or channel mixer.

    Args:
        d_model: width.
        mixer: makes the mixer from `d_model`; it maps `(b, l, d_model)`, mask and seq_idx to `(b, l, d_model)`.
        mlp: None, "gelu", "swiglu" or "channel_mixer". mlp_ratio, mlp_reach: `ratio` and `reach` of `MLP`.
        drop_path: rate of stochastic depth. layer_scale: first value of the branch's factors, None for none.
        dropout: on the branches, and inside the MLP.
        channel_mixer: makes the channel mixer from `d_model`.
    """

    def __init__(
        self,
        d_model: int,
        mixer: Callable[..., nn.Module],
        mlp: str | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        dropout: float = 0.0,
        channel_mixer: Callable[..., nn.Module] = ChannelMixer,
        mlp_reach: int = 0,
    ) -> None:
        super().__init__()
        if mlp_reach and mlp not in ("gelu", "swiglu"):
            raise ValueError(f"mlp_reach: expected 0 unless mlp is 'gelu' or 'swiglu', got {mlp_reach} and mlp={mlp!r}")

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(d_model, layer_scale)

        self.norm1, self.mixer, self.scale1 = RMSNorm(d_model, cast=True), mixer(d_model), scale()
        self.mlp = None
        if mlp is not None:
            self.norm2, self.scale2 = RMSNorm(d_model, cast=True), scale()
            mixes = mlp == "channel_mixer"
            self.mlp = channel_mixer(d_model) if mixes else MLP(d_model, mlp_ratio, mlp, dropout, mlp_reach)
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.scale1(self.dropout(self.mixer(self.norm1(x), mask, seq_idx))), seq_idx)
        if self.mlp is not None:
            x = x + self.drop_path(self.scale2(self.dropout(self.mlp(self.norm2(x), mask, seq_idx))), seq_idx)
        return x
