"""Backbone = blocks and a norm; classifier = embedding, backbone, pooling, head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bimamba.finetune import frozen_parts, load_pretrained
from bimamba.hub import HubModel
from bimamba.nn import (
    BiMamba2,
    Block,
    ChannelMixer,
    ClassTokenPooling,
    MeanPooling,
    NucleotideEmbedding,
    PatchEmbedding,
    Pooling,
    TokenPooling,
)
from bimamba.nn.norm import RMSNorm
from bimamba.ops.backend import expect_bool
from bimamba.packing import Packing, packing_of
from bimamba.pretrained import NOT_SAVED
from bimamba.spec import DataSpec
from bimamba.strands import PAIRS, both_strands, complements_for, turned

SCAN_ORDERS = ("rows", "columns")


class Backbone(nn.Module):
    """`depth` pre-norm blocks and a last norm: `(b, l, d_model)` to `(b, l, d_model)`.

    Args:
        d_model, depth: width and number of blocks. mixer: makes a block's mixer from `d_model`.
        mlp, mlp_ratio, mlp_reach, layer_scale, dropout, channel_mixer: see `Block`.
        drop_path: rate of stochastic depth of the last block; it rises linearly from zero at the first.
        checkpoint_blocks: keep only the blocks' inputs for the backward pass and recompute the rest, with the
            parameters that the blocks have then: not for `torch.func.functional_call`.
        scan_order: in which order the first, second, … block (and then from the beginning again) reads an image's
            tokens: `rows` or `columns` (several scans of an image: Liu et al. 2024, "VMamba", arXiv:2401.10166).
        grid: rows and columns of an image's tokens; needed for `columns`.

    Raises:
        ValueError: no block, an unknown order, or columns of what is no image.
    """

    def __init__(
        self,
        d_model: int,
        depth: int,
        mixer: Callable[..., nn.Module],
        mlp: str | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        dropout: float = 0.0,
        checkpoint_blocks: bool = False,
        scan_order: Sequence[str] = ("rows",),
        grid: tuple[int, int] | None = None,
        channel_mixer: Callable[..., nn.Module] = ChannelMixer,
        mlp_reach: int = 0,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth: expected at least 1, got {depth}")
        if not scan_order or isinstance(scan_order, str) or not set(scan_order) <= set(SCAN_ORDERS):
            raise ValueError(f"scan_order: expected a list of {' and '.join(SCAN_ORDERS)}, got {scan_order!r}")
        if "columns" in scan_order and grid is None:
            raise ValueError(
                "scan_order: columns are those of an image whose embedding keeps rows apart (patches, pixels, "
                "conv_stem) and whose pooling adds no token; expected [rows] here"
            )
        self.scan_order, self.grid = tuple(scan_order), grid
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(d_model, mixer, mlp, mlp_ratio, rate, layer_scale, dropout, channel_mixer, mlp_reach)
            for rate in rates
        )
        self.norm = RMSNorm(d_model)
        self.checkpoint_blocks = checkpoint_blocks
        self.branches = depth * (1 if mlp is None else 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("out_proj.weight"):  # GPT-2: the residual stream's variance stays that of one branch
                nn.init.normal_(parameter, std=0.02 / math.sqrt(self.branches))

    def forward(self, x: Tensor, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """x: `(b, l, d_model)`; mask: `(b, l)` bool, False at padding; seq_idx: `(b, l)`, packed sequences."""
        now = "rows"
        for block, order in zip(self.blocks, cycle(self.scan_order)):
            x, now = self._read(x, now, order), order
            if self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, mask, seq_idx, use_reentrant=False, preserve_rng_state=_draws(block))
            else:
                x = block(x, mask, seq_idx)
        return self.norm(self._read(x, now, "rows"))

    def _read(self, x: Tensor, now: str, order: str) -> Tensor:
        """An image's tokens in another order. Masks need no turning: images have none."""
        if now == order:
            return x
        assert self.grid is not None
        shape = self.grid if now == "rows" else self.grid[::-1]
        return x.unflatten(1, shape).transpose(1, 2).flatten(1, 2)


def _draws(block: nn.Module) -> bool:
    """Whether a block draws random numbers, or may: a rate above zero, or a module that is not torch's or ours. To put
    the generators back for one that does not is the host's time for nothing."""
    for module in block.modules():
        rates = [module.__dict__.get(name, 0) for name in ("p", "rate", "dropout")]
        if not type(module).__module__.startswith(("torch.nn.", "bimamba.")):
            return True
        if any(isinstance(rate, int | float) and rate > 0 for rate in rates):
            return True
    return False


class Head(nn.Module):
    """Dropout and a linear layer, `(b, d_model)` to `(b, num_outputs)`: logits, or values for regression."""

    def __init__(self, d_model: int, num_outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout, self.proj = nn.Dropout(dropout), nn.Linear(d_model, num_outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.dropout(x))


class Classifier(HubModel):
    """Classifies images or sequences; also multilabel and regression, by the spec's `num_outputs`.

    Args:
        spec: what the data is; decides the input's size, the vocabulary and the number of outputs.
        embedding: makes the embedding from `(spec, d_model)`; default patches for images, nucleotides for sequences.
        pooling: makes the pooling from `d_model`. head_dropout: before the last layer.
        rc_equivariant: read a DNA sequence and its reverse complement by the same weights, so that neither strand is
            preferred (the parameter sharing of Caduceus' RCPS, Schiff et al. 2024, arXiv:2403.03234: its two halves of
            the channels are the two strands here, `d_model` channels each, and meet behind the last block). In
            evaluation the logits do not change by reverse complement; with `TokenPooling` the features and the letters'
            logits are equivariant. As many parameters as without, twice the time and activations.
        pretrained: folder, repository of the Hub or checkpoint to start from, see `bimamba.finetune.load_pretrained`.
        freeze: what does not learn, see `bimamba.finetune.frozen_parts`; it stays in evaluation mode, too.
        The others are the `Backbone`'s.

    `save_pretrained`, `from_pretrained`, `push_to_hub`: see `bimamba.hub.HubModel`.

    Raises:
        ValueError: sizes that do not fit each other or the data, or a pretrained model that does not fit.
        FileNotFoundError: no such pretrained model.

    Example:
        >>> spec = DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=100)
        >>> Classifier(spec, d_model=64, depth=2)(torch.randint(1, 5, (2, 100))).shape
        torch.Size([2, 1])
    """

    pooling: Pooling
    embedding: nn.Module
    complement: Tensor  # of each token id, where rc_equivariant
    letters: Tensor  # number of each letter's complement, where an output a letter is, too

    def __init__(
        self,
        spec: DataSpec,
        d_model: int = 128,
        depth: int = 6,
        embedding: Callable[..., nn.Module] | None = None,
        mixer: Callable[..., nn.Module] = BiMamba2,
        pooling: Callable[..., nn.Module] = MeanPooling,
        mlp: str | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        dropout: float = 0.0,
        head_dropout: float = 0.0,
        checkpoint_blocks: bool = False,
        scan_order: Sequence[str] = ("rows",),
        rc_equivariant: bool = False,
        channel_mixer: Callable[..., nn.Module] = ChannelMixer,
        mlp_reach: int = 0,
        pretrained: str | Path | None = None,
        freeze: str | int | None = None,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__", "spec", *NOT_SAVED)}
        super().__init__()
        self.spec, self.arguments, self.rc_equivariant = spec, arguments, rc_equivariant
        if embedding is None:
            embedding = arguments["embedding"] = PatchEmbedding if spec.kind == "image" else NucleotideEmbedding
        self.embedding = embedding(spec, d_model)
        self.pooling = cast(Pooling, pooling(d_model))
        grid = None if isinstance(self.pooling, ClassTokenPooling) else getattr(self.embedding, "grid", None)
        self.backbone = Backbone(
            d_model,
            depth,
            mixer,
            mlp,
            mlp_ratio,
            drop_path,
            layer_scale,
            dropout,
            checkpoint_blocks,
            scan_order,
            grid,
            channel_mixer,
            mlp_reach,
        )
        self.head = Head(d_model, spec.num_outputs, head_dropout)
        if rc_equivariant:
            self._know_strands("cpu")
        if pretrained is not None:
            load_pretrained(self, pretrained)
        self.frozen = frozen_parts(self, freeze)

    def reset_parameters(self) -> None:
        """The complements, which `to_empty` empties, too; what is learned belongs to the parts."""
        if self.rc_equivariant:
            self._know_strands(self.complement.device)

    def train(self, mode: bool = True) -> Classifier:
        """As of every module, but what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        bounds: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            inputs: images `(b, c, height, width)` or token ids `(b, l)`.
            mask: `(b, l)` bool, True for real tokens, padding at the end; None: no padding.
            seq_idx: `(b, l)` ints that do not decrease along a row: n sequences packed into b rows.
            bounds, order: what else a `bimamba.packing.Packing` says; without them they are computed from `seq_idx`
                (waiting for the device) and the sequences come in the order of the rows.

        Returns:
            `(b, num_outputs)`; packed: `(n, num_outputs)`.

        Raises:
            ValueError: inputs of another shape than the spec's, or a mask that is not bool.
        """
        x = self.features(inputs, mask, seq_idx, bounds, order)
        if not (self.rc_equivariant and isinstance(self.pooling, TokenPooling)):
            return self.head(x)
        own, other = x.chunk(2, dim=-1)
        return (self.head(own) + self.head(other)[..., self.letters]) / 2

    def features(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        bounds: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Tensor:
        """The vector before the head, `(b, d_model)`; packed: `(n, d_model)`; of `TokenPooling` `(b, l, d_model)`.

        With `rc_equivariant` the mean of both strands' vectors; of `TokenPooling` both, `(b, l, 2 d_model)`, token by
        token: the reverse complement's are these in reverse order with the two halves exchanged.
        """
        self._check(inputs, mask, seq_idx)
        packing: Packing | None = None
        if seq_idx is not None:
            packing = packing_of(seq_idx, mask) if order is None or bounds is None else Packing(seq_idx, bounds, order)
        if not self.rc_equivariant:
            return self._features(inputs, mask, packing)
        x = self._features(*both_strands(inputs, self.complement, mask, packing))
        own, other = x.unflatten(0, (2, -1)).unbind()  # not chunk, which torch.export cannot trace for any batch
        if isinstance(self.pooling, TokenPooling):
            return torch.cat([own, turned(other, mask, packing)], dim=-1)
        return (own + other) / 2

    def _features(self, inputs: Tensor, mask: Tensor | None, packing: Packing | None) -> Tensor:
        if packing is None:
            x, mask, _ = self.pooling.insert(self.embedding(inputs, mask), mask)
            return self.pooling(self.backbone(x, mask), mask)
        x, mask, packing = self.pooling.insert(self.embedding(inputs, mask, packing), mask, packing)
        assert packing is not None  # a pooling keeps what it is given
        return self.pooling(self.backbone(x, mask, packing.seq_idx), mask, packing)

    def _know_strands(self, device: torch.device | str) -> None:
        """What `rc_equivariant` needs: complements of token ids and, for an output a letter, of the classes.

        On the CPU at first, whatever else is made on meta: no state dict has them, so that they would stay there.
        """
        complement = complements_for("model.rc_equivariant", self.spec).to(device)
        self.register_buffer("complement", complement, persistent=False)
        if isinstance(self.pooling, TokenPooling):
            names = self.spec.class_names
            if not {PAIRS.get(name) for name in names} <= set(names):
                raise ValueError(
                    "model.rc_equivariant: an output a token needs classes that are letters with their complements "
                    f"(A, C, G, T: pretraining), got {list(names)}"
                )
            letters = torch.tensor([names.index(PAIRS[name]) for name in names], device=device)
            self.register_buffer("letters", letters, persistent=False)

    def _check(self, inputs: Tensor, mask: Tensor | None, seq_idx: Tensor | None) -> None:
        spec = self.spec
        if spec.kind == "image":
            expected = (spec.channels, spec.height, spec.width)
            if inputs.dim() != 4 or tuple(inputs.shape[1:]) != expected:
                raise ValueError(f"inputs: expected (b, {', '.join(map(str, expected))}), got {tuple(inputs.shape)}")
        elif inputs.dim() != 2:
            raise ValueError(f"inputs: expected token ids (b, l), got {tuple(inputs.shape)}")
        if seq_idx is not None and spec.kind == "image":
            raise ValueError("seq_idx: expected none with images, which are not packed")
        for name, value in (("mask", mask), ("seq_idx", seq_idx)):
            if value is not None and tuple(value.shape) != tuple(inputs.shape[:2]):
                raise ValueError(f"{name}: expected {tuple(inputs.shape[:2])}, got {tuple(value.shape)}")
        expect_bool(mask)
