"""A selective state-space scan over the channels of each token, in place of the block's MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bimamba.nn.decay import undecayed
from bimamba.nn.mamba2 import BiMamba2


class ChannelMixer(nn.Module):
    """Channels mixed by a bidirectional scan along them, `(b, l, d_model)` to `(b, l, d_model)`.

    The selective channel mixer of MambaMixer (Behrouz et al. 2024, arXiv:2403.19888): which channels inform which
    depends on the input. There a step of the scan is one channel of all tokens, so that its weights belong to one
    length. Here each token is read by itself, as an MLP reads it, in `d_model / group` steps of `group` channels: the
    same weights serve every length, and neither padding nor the sequences of a packed row see each other. Channels have
    no order by nature: each gets a learned offset, by which the scan knows them (ours, not the paper's).

    Args:
        d_model: channels of a token. group: channels of a step; fewer mean more steps, and more time and activations.
        d_state, d_conv, expand, headdim: of the `BiMamba2` over the steps; `headdim` divides `expand * group`.

    Raises:
        ValueError: `group` does not divide `d_model`, or leaves a single step; sizes that do not fit each other.
    """

    def __init__(
        self, d_model: int, group: int = 8, d_state: int = 16, d_conv: int = 3, expand: int = 2, headdim: int = 8
    ) -> None:
        super().__init__()
        if group < 1 or d_model % group or d_model == group:
            raise ValueError(
                f"model.channel_mixer.group: expected a divisor of d_model = {d_model} that is smaller, got {group}"
            )
        if headdim < 1 or (expand * group) % headdim:
            raise ValueError(
                f"model.channel_mixer.headdim: expected a divisor of expand * group = {expand * group}, got {headdim}"
            )
        self.d_model, self.group = d_model, group
        self.offset = nn.Parameter(torch.empty(d_model // group, group))
        undecayed(self, "offset")
        self.reset_parameters()
        self.mixer = BiMamba2(group, d_state, d_conv, expand=expand, headdim=headdim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.offset, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """x: `(b, l, d_model)`; the result has its shape, and each token's depends on that token alone, whatever mask
        and seq_idx say."""
        if x.shape[-1] != self.d_model:
            raise ValueError(f"x: expected (b, l, d_model) with d_model = {self.d_model}, got {tuple(x.shape)}")
        steps = x.unflatten(-1, self.offset.shape).flatten(0, -3)  # b*l steps group
        return self.mixer(steps + self.offset.to(x.dtype)).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"steps={self.d_model // self.group}, group={self.group}"
