"""The Mamba-2 mixers: `BiMamba2`, in both directions, and `Mamba2`, causal. One implementation, a flag apart."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bimamba.nn.decay import undecayed
from bimamba.ops.backend import autocasts, expect_bool, expect_device
from bimamba.ops.conv1d import ACTIVATIONS, MAX_WIDTH, depthwise_conv1d
from bimamba.ops.gated_norm import rms_norm_gated
from bimamba.ops.projection import aligned
from bimamba.ops.ssd import bimamba_chunk_scan_combined, choose_backend, mamba_chunk_scan_combined
from bimamba.ops.ssd.api import allow_tf32, debugging

INF = float("inf")


class RMSNormGated(nn.Module):
    """`RMSNorm(y) * SiLU(z)`, or `RMSNorm(y * SiLU(z))`; see `rms_norm_gated`."""

    def __init__(
        self, d: int, eps: float = 1e-5, norm_before_gate: bool = True, group_size: int | None = None, **factory
    ):
        super().__init__()
        self.eps, self.norm_before_gate, self.group_size = eps, norm_before_gate, group_size
        self.weight = nn.Parameter(torch.empty(d, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        return rms_norm_gated(y, z, self.weight, self.eps, self.norm_before_gate, self.group_size)


class Projection(nn.Linear):
    """A linear layer that on GPUs returns a few columns of zeros behind its own: see `aligned`."""

    def forward(self, u: Tensor) -> Tensor:
        return F.linear(u, *aligned(u, self.weight, self.bias))


def _exact(t: Tensor) -> Tensor:
    """In float32, or better where it is better already."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module may be passed by: it is what was put there (an adapter would be another), and nobody listens."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks)


class _Mamba2(nn.Module):
    """in_proj -> depthwise convolution -> scan -> gated norm -> out_proj, `(b, l, d_model)` to the same."""

    bidirectional: bool

    def __init__(
        self,
        d_model: int,
        d_state: int,
        d_conv: int,
        conv_init: float | None,
        expand: int,
        headdim: int,
        ngroups: int,
        A_init_range: tuple[float, float],
        dt_min: float,
        dt_max: float,
        dt_init_floor: float,
        dt_limit: tuple[float, float],
        learnable_init_states: bool,
        activation: str,
        bias: bool,
        conv_bias: bool,
        norm_before_gate: bool,
        chunk_size: int,
        use_mem_eff_path: bool,
        layer_idx: int | None,
        device,
        dtype,
        tied: bool = True,
        shift: bool = False,
    ) -> None:
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        sizes = dict(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, headdim=headdim, ngroups=ngroups)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = expand * d_model
        self.headdim, self.ngroups = headdim, ngroups
        if self.d_inner % headdim:
            raise ValueError(
                f"headdim: expected a divisor of expand * d_model = {self.d_inner}, got {headdim}; "
                f"choose headdim, expand or d_model so that they fit"
            )
        self.nheads = self.d_inner // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups: expected a divisor of the {self.nheads} heads, got {ngroups}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {dt_min}, {dt_max}")
        if len(A_init_range) != 2 or not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(
                f"A_init_range: expected (least, largest) with 0 < least <= largest, got {tuple(A_init_range)}"
            )
        self.activation, self.dt_limit = activation, (dt_limit[0], dt_limit[1])
        self.chunk_size, self.use_mem_eff_path, self.layer_idx = chunk_size, use_mem_eff_path, layer_idx
        self.tied, self.shift = tied, shift
        self.directions = 1 if tied else 2

        d_BC = self.ngroups * d_state
        self.in_proj = Projection(
            d_model, 2 * self.d_inner + self.directions * (2 * d_BC + self.nheads), bias=bias, **factory
        )
        d_xBC = self.d_inner + self.directions * 2 * d_BC
        # Holds the parameters alone: the convolution itself runs channels last, with padding and packing respected.
        self.conv1d = nn.Conv1d(d_xBC, d_xBC, d_conv, groups=d_xBC, bias=conv_bias, **factory)
        if learnable_init_states:
            states = torch.empty(2 if self.bidirectional else 1, self.nheads, headdim, d_state, **factory)
            self.init_states = nn.Parameter(states)
        else:
            self.register_parameter("init_states", None)
        heads = self.directions * self.nheads
        self.dt_bias = nn.Parameter(torch.empty(heads, **factory))
        self.A_log = nn.Parameter(torch.empty(heads, **factory))
        self.D = nn.Parameter(torch.empty(self.nheads, **factory))
        self.conv_init, self.A_init_range = conv_init, (A_init_range[0], A_init_range[1])
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.reset_parameters()
        undecayed(self, "init_states", "dt_bias", "A_log", "D")
        self.norm = RMSNormGated(self.d_inner, norm_before_gate=norm_before_gate, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -self.conv_init, self.conv_init)
        if self.init_states is not None:
            nn.init.zeros_(self.init_states)
        drawn = torch.get_default_dtype()  # not the parameters', which may be a coarse one
        lowest, highest = math.log(self.dt_min), math.log(self.dt_max)
        dt = torch.exp(torch.rand_like(self.dt_bias, dtype=drawn) * (highest - lowest) + lowest)
        dt = dt.clamp(min=self.dt_init_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus inverted
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=drawn).uniform_(*self.A_init_range).log())
        nn.init.ones_(self.D)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Mamba-2's and Bi-Mamba2's states have no direction: each here begins with them. (Bi-Mamba2 never reads its
        # own, which stay zeros.)
        given = state_dict.get(f"{prefix}init_states")
        if given is not None and self.init_states is not None and given.shape == self.init_states.shape[1:]:
            state_dict[f"{prefix}init_states"] = given.repeat(len(self.init_states), 1, 1, 1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, u: Tensor, mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """
        Args:
            u: `(b, l, d_model)`.
            mask: `(b, l)` bool, True for real tokens; padding, before or after them, does not change their output.
            seq_idx: `(b, l)` ints that do not decrease along a row: sequences packed into one row.

        Returns:
            `(b, l, d_model)`; rows at padding are not meaningful.

        Raises:
            ValueError: an input whose shape, dtype or device does not fit, or that has no token.
        """
        if u.dim() != 3 or u.shape[-1] != self.d_model:
            raise ValueError(f"u: expected (b, l, d_model) with d_model = {self.d_model}, got {tuple(u.shape)}")
        if 0 in u.shape:
            raise ValueError(f"u: expected (b, l, d_model) with no empty dimension, got {tuple(u.shape)}")
        if mask is not None and mask.shape != u.shape[:2]:
            raise ValueError(f"mask: expected shape (b, l) = {tuple(u.shape[:2])}, got {tuple(mask.shape)}")
        if seq_idx is not None and self.init_states is not None:
            raise ValueError(
                "learnable_init_states: a packed row has one first and one last token, which are not those of each "
                "sequence; expected learnable_init_states=false with packing"
            )
        expect_bool(mask)
        if seq_idx is not None and seq_idx.shape != u.shape[:2]:
            raise ValueError(f"seq_idx: expected shape (b, l) = {tuple(u.shape[:2])}, got {tuple(seq_idx.shape)}")
        expect_device("u", u, mask=mask, seq_idx=seq_idx)
        if not (self.use_mem_eff_path and torch.is_grad_enabled()):
            return self._mixed(u, mask, seq_idx)
        if self._is_one_node(u, mask) and self._projects_plainly(u):
            dtype = torch.get_autocast_dtype(u.device.type) if autocasts(u) else u.dtype
            return self._as_one_node(u.to(dtype), mask, seq_idx, whole=True)
        return checkpoint(self._mixed, u, mask, seq_idx, use_reentrant=False)

    def _mixed(self, u: Tensor, mask: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        projected = self.in_proj(u)
        if self._is_one_node(projected, mask):
            return self.out_proj(self._as_one_node(projected, mask, seq_idx))
        return self._after_projection(projected, mask, seq_idx)

    def _is_one_node(self, t: Tensor, mask: Tensor | None) -> bool:
        """Whether the kernels take convolution, scan and norm at once, in the dtype and on the device of `t`."""
        return not (
            self.init_states is not None
            or (mask is not None and self.dt_limit[0] > 0.0)
            or self.d_conv > MAX_WIDTH
            or not _is_plain(self.norm, RMSNormGated)
            or debugging()
            or choose_backend(t, self.d_state, p=self.headdim) != "triton"
        )

    def _projects_plainly(self, u: Tensor) -> bool:
        """Whether that node may take the projections, too."""
        plain = _is_plain(self.in_proj, Projection) and _is_plain(self.out_proj, nn.Linear)
        return plain and (autocasts(u) or u.dtype == self.in_proj.weight.dtype == self.out_proj.weight.dtype)

    def _as_one_node(self, source: Tensor, mask: Tensor | None, seq_idx: Tensor | None, whole: bool = False) -> Tensor:
        """Of the input projection to the gated norm's output or, `whole`, of its input to the layer's output."""
        from bimamba.ops.mixer import Form, Parameters, mixer

        form = Form(
            headdim=self.headdim,
            d_state=self.d_state,
            ngroups=self.ngroups,
            bidirectional=self.bidirectional,
            tied=self.tied,
            shift=self.shift,
            activate=self.activation != "none",
            least=float(self.dt_limit[0]),
            largest=float(self.dt_limit[1]),
            eps=self.norm.eps,
            norm_before_gate=self.norm.norm_before_gate,
            group_size=self.norm.group_size or self.d_inner,
            allow_tf32=allow_tf32(),
        )
        parameters = Parameters(
            conv_weight=self.conv1d.weight,
            conv_bias=self.conv1d.bias,
            dt_bias=self.dt_bias,
            A_log=self.A_log,
            D=self.D,
            norm_weight=self.norm.weight,
        )
        if whole:
            weight, bias = aligned(source, self.in_proj.weight.to(source.dtype), self.in_proj.bias)
            out_weight = self.out_proj.weight.to(source.dtype)
            parameters = parameters._replace(
                in_weight=weight, in_bias=bias, out_weight=out_weight, out_bias=self.out_proj.bias
            )
        return mixer(source, mask, seq_idx, parameters, form)

    def _after_projection(self, projected: Tensor, mask: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        d_BC = self.ngroups * self.d_state
        sizes = [self.d_inner, self.conv1d.in_channels, self.directions * self.nheads]
        z, xBC, dt, _ = projected.split([*sizes, projected.shape[-1] - sum(sizes)], dim=-1)
        x, *BC = depthwise_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.activation,
            not self.bidirectional,
            mask,
            seq_idx,
            split=(self.d_inner, *[d_BC] * 2 * self.directions),
        )
        x = x.unflatten(-1, (self.nheads, self.headdim))
        Bs, Cs = ([t.unflatten(-1, (self.ngroups, self.d_state)) for t in BC[i::2]] for i in (0, 1))
        y = self._scan(x, dt, Bs, Cs, mask, seq_idx)
        return self.out_proj(self.norm(y.flatten(-2), z))

    def _scan(self, x: Tensor, dt: Tensor, Bs: list[Tensor], Cs: list[Tensor], mask, seq_idx) -> Tensor:
        A = -torch.exp(_exact(self.A_log))
        options: dict[str, Any] = dict(dt_bias=self.dt_bias, dt_softplus=True, dt_limit=self.dt_limit)
        if mask is not None:
            if self.dt_limit[0] > 0.0:  # a step size of zero at padding lies outside the limit: clamp before masking
                dt = (
                    F.softplus(_exact(dt) + _exact(self.dt_bias))
                    .clamp(*self.dt_limit)
                    .masked_fill(~mask[..., None], 0.0)
                )
                options = {}
            else:
                dt = dt.masked_fill(~mask[..., None], -1e4)  # softplus gives exactly 0: no decay, no contribution
        states = None
        if self.init_states is not None:
            states = self.init_states[:, None].expand(-1, x.shape[0], -1, -1, -1)
        options |= dict(chunk_size=self.chunk_size, D=self.D, seq_idx=seq_idx)
        if not self.bidirectional:
            options["initial_states"] = None if states is None else states[0]
            return cast(Tensor, mamba_chunk_scan_combined(x, dt, A, Bs[0], Cs[0], **options))
        shared: dict[str, Any] = dict(dt=dt, A=A, B=Bs[0], C=Cs[0])
        if not self.tied:
            shared = dict(dt=dt.chunk(2, dim=-1), A=A.chunk(2), B=tuple(Bs), C=tuple(Cs))
            if "dt_bias" in options:
                options["dt_bias"] = self.dt_bias.chunk(2)
        options["initial_states"] = None if states is None else (states[0], states[1])
        return cast(Tensor, bimamba_chunk_scan_combined(x, **shared, shift=self.shift, **options))

    def extra_repr(self) -> str:
        return f"nheads={self.nheads}, headdim={self.headdim}, d_state={self.d_state}, ngroups={self.ngroups}"


class BiMamba2(_Mamba2):
    """Bidirectional Mamba-2 mixer, `(b, l, d_model)` to `(b, l, d_model)`, at Bi-Mamba2's signature.

    `y = SS(x) + flip(SS(flip(x))) + D x` with one set of projections, between a non-causal depthwise convolution and a
    gated norm (Dao and Gu 2024, arXiv:2405.21060; Hwang et al. 2024, arXiv:2407.09941).

    Args:
        d_model: width of input and output. expand: `d_inner = expand * d_model`, split into heads of `headdim`.
        d_state: n, the state size. ngroups: groups of heads that share B and C. d_conv: width of the convolution.
        conv_init: draw the convolution's weights uniformly from (-conv_init, conv_init).
        dt_min, dt_max, dt_init_floor: range of the step sizes at the start. dt_limit: range that they are clamped to.
        learnable_init_states: learn the states before the first and after the last token.
        activation: of the convolution. bias: of the projections. conv_bias: of the convolution.
        chunk_size: see `bimamba_chunk_scan_combined`.
        use_mem_eff_path: keep only the input for the backward pass and recompute the rest. On the PyTorch path by
            `torch.utils.checkpoint`, which takes the parameters that the module has then: not for
            `torch.func.functional_call`.
        layer_idx: kept for callers that number their layers; not used.
        tied: False gives each direction B, C, dt and A of its own. shift: Hydra's quasi-separable form.
        A_init_range: `-A` is drawn uniformly from it. norm_before_gate: `RMSNorm(y) SiLU(z)`, else
            `RMSNorm(y SiLU(z))`.

    Raises:
        ValueError: sizes below 1 or that do not divide, a range out of order, or an unknown activation.
    """

    bidirectional = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 7,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, INF),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = False,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        *,
        tied: bool = True,
        shift: bool = False,
        A_init_range: tuple[float, float] = (1.0, 1.0),
        norm_before_gate: bool = True,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__(**arguments)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Bi-Mamba2 allocates this layer and never uses it; its checkpoints load here without it.
        state_dict.pop(f"{prefix}fc_D.weight", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Mamba2(_Mamba2):
    """Causal Mamba-2 mixer (Dao and Gu 2024, arXiv:2405.21060); arguments as of `BiMamba2`."""

    bidirectional = False

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, INF),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = False,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        *,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        norm_before_gate: bool = False,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__(**arguments)
