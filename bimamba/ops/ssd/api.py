"""The public scans: arguments are validated here, once, and a backend is chosen. See `bimamba_chunk_scan_combined`."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..backend import autocasts, expect_device
from ..backend import choose_backend as backend_rule
from .chunked import best_chunk, ssd_chunked
from .reference import Direction, ssd_reference

BACKENDS = ("auto", "triton", "torch", "reference")
MAX_SIZE = 256  # of p and n in the Triton kernels
INF = float("inf")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def bimamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor | tuple[Tensor, Tensor],
    A: Tensor | tuple[Tensor, Tensor],
    B: Tensor | tuple[Tensor, Tensor],
    C: Tensor | tuple[Tensor, Tensor],
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | tuple[Tensor, Tensor] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    seq_idx: Tensor | None = None,
    initial_states: tuple[Tensor | None, Tensor | None] | None = None,
    return_final_states: bool = False,
    backend: str = "auto",
    *,
    shift: bool = False,
    save_states: bool | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Bidirectional Mamba-2 scan, `y = (SS(x) + flip(SS(flip(x))) + D x) * SiLU(z)`.

    `SS` is the state-space dual operator of Dao and Gu, "Transformers are SSMs" (2024, arXiv:2405.21060), with
    `delta = clamp(softplus(dt + dt_bias), *dt_limit)`, `h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T` and
    `y_t = h_t C_t`. `D x` counts once, a token's own contribution through the state in both directions.

    Args:
        x: `(b, l, h, p)`, bf16, fp16, fp32 or fp64 (fp64: backends torch and reference). Any length, p and n.
        dt: `(b, l, h)`, a float dtype. `dt, A, B, C, dt_bias` may each be a pair (forward, backward): a direction then
            reads parameters of its own.
        A: `(h)`, negative. Positive values make the state grow without bound; only `BIMAMBA_DEBUG=1` checks it, since
            a check must wait for the device.
        B, C: `(b, l, g, n)` with `h % g == 0`, in the dtype of `x`.
        chunk_size: upper bound of the chunk length on the torch backend, None for the fastest. The Triton kernels
            choose their own. It never changes the result beyond rounding.
        D: `(h)` or `(h, p)`. z: `(b, l, h, p)`, gates the output. dt_bias: `(h)`.
        dt_softplus: whether softplus is applied to `dt + dt_bias`.
        dt_limit: (least, largest) step size; its gradient is zero where it is clamped.
        seq_idx: `(b, l)` int32 or int64, not decreasing along a row (checked by `BIMAMBA_DEBUG=1`): nothing crosses
            from one value to the next, in either direction, so that several sequences share a row.
        initial_states: pair (before the first token, after the last token), each `(b, h, p, n)` or None.
        return_final_states: also return the pair (after the last token of the forward direction, after the first of
            the backward direction), `(b, h, p, n)` in float32 each.
        backend: "auto" (Triton on GPUs that have it, else torch), "triton", "torch" or "reference" (the recurrence, for
            tests). The environment variable `BIMAMBA_BACKEND` replaces "auto".
        shift: Hydra's quasi-separable form (Hwang et al. 2024, arXiv:2407.09941), `shift(SS(x)) +
            flip(shift(SS(flip(x)))) + D x`: a token sees the others through the states and itself through `D` alone.
        save_states: Triton: keep the passed chunk states for the backward pass (True), or recompute them (False: less
            memory, 10-20 % more time); None chooses by size.

    Returns:
        `y (b, l, h, p)` in the dtype of `x`, or `(y, (final_forward, final_backward))`.

    Raises:
        ValueError: an argument has a rank, size, dtype or device that does not fit; the message names it.

    float32 products are exact unless `torch.set_float32_matmul_precision("high")` allows TF32.
    """
    shared: dict[str, Any] = dict(dt=dt, A=A, B=B, C=C, dt_bias=dt_bias)
    forward = Direction(**{k: v[0] if _is_pair(v, k) else v for k, v in shared.items()})
    untied = any(isinstance(v, (tuple, list)) for v in shared.values())
    backward = Direction(**{k: v[1] if _is_pair(v, k) else v for k, v in shared.items()}) if untied else forward
    if initial_states is None:
        initial_states = (None, None)
    elif not isinstance(initial_states, (tuple, list)) or len(initial_states) != 2:
        raise ValueError(
            f"initial_states: expected a pair (forward, backward) of tensors or None, got {_describe(initial_states)}"
        )
    y, final_forward, final_backward = _scan(
        x,
        forward,
        backward,
        chunk_size=chunk_size,
        D=D,
        z=z,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        seq_idx=seq_idx,
        initial_states=(initial_states[0], initial_states[1]),
        return_final_states=return_final_states,
        backend=backend,
        shift=shift,
        save_states=save_states,
    )
    if not return_final_states:
        return y
    assert final_forward is not None and final_backward is not None
    return y, (final_forward, final_backward)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INF),
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    backend: str = "auto",
    *,
    save_states: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal Mamba-2 scan, `y = (SS(x) + D x) * SiLU(z)`; arguments as of `bimamba_chunk_scan_combined`.

    `initial_states` and the final state returned are one tensor `(b, h, p, n)` each.

    Raises:
        ValueError: an argument has a rank, size, dtype or device that does not fit; the message names it.
    """
    y, final, _ = _scan(
        x,
        Direction(dt, A, B, C, dt_bias),
        None,
        chunk_size=chunk_size,
        D=D,
        z=z,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        seq_idx=seq_idx,
        initial_states=(initial_states, None),
        return_final_states=return_final_states,
        backend=backend,
        shift=False,
        save_states=save_states,
    )
    if not return_final_states:
        return y
    assert final is not None
    return y, final


def _scan(
    x: Tensor,
    forward: Direction,
    backward: Direction | None,
    *,
    chunk_size: int | None,
    return_final_states: bool,
    backend: str,
    save_states: bool | None,
    **options,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    _validate(x, forward, backward, chunk_size, **options)
    if autocasts(x):  # the scan keeps its inputs' dtypes: decays and states are float32
        forward, backward, z = _cast(x.dtype, forward, backward, options["z"])
        options["z"] = z
    backend = choose_backend(x, forward.B.shape[-1], backend)
    if backend == "triton":
        return _triton(
            x, forward, backward, return_final_states=return_final_states, save_states=save_states, **options
        )
    if backend == "reference":
        y, final_forward, final_backward = ssd_reference(x, forward, backward, **options)
        return y.to(x.dtype), final_forward, final_backward
    q = best_chunk(x.shape[1], x.shape[-1], forward.B.shape[-1])
    q = min(chunk_size or q, q)
    return ssd_chunked(x, forward, backward, chunk_size=q, return_final_states=return_final_states, **options)


@torch.compiler.assume_constant_result  # some versions of Dynamo cannot trace it
def allow_tf32() -> bool:
    """Whether products of float32 may be TF32, by `torch.set_float32_matmul_precision`."""
    return torch.get_float32_matmul_precision() != "highest"


def _triton(x: Tensor, forward: Direction, backward: Direction | None, *, initial_states, **options):
    from . import binding

    own: dict[str, Any] = {}
    if backward is not None and backward is not forward:
        own = {f"{name}_back": value for name, value in backward._asdict().items()}
    return binding.chunk_scan(
        x,
        **forward._asdict(),
        **own,
        initial_states=initial_states,
        bidirectional=backward is not None,
        allow_tf32=allow_tf32(),
        **options,
    )


def _cast(dtype: torch.dtype, forward: Direction, backward: Direction | None, z: Tensor | None):
    """Under autocast a block hands over `x`, `B`, `C`, `z` in mixed dtypes: all take that of `x`."""

    def cast(d: Direction) -> Direction:
        return d._replace(B=d.B.to(dtype), C=d.C.to(dtype))

    tied = backward is forward
    forward = cast(forward)
    backward = forward if tied else (None if backward is None else cast(backward))
    return forward, backward, None if z is None else z.to(dtype)


# ---------------------------------------------------------------------------------------------------- backend


def choose_backend(x: Tensor, n: int, backend: str = "auto", p: int | None = None) -> str:
    """The backend that serves `x (b, l, h, p)` with state size `n`: "triton", "torch" or "reference". With `p` a tensor
    of x's dtype and device will do.

    See `bimamba.ops.backend.choose_backend` for the rule and its errors.
    """
    return backend_rule(x, backend, BACKENDS, lambda: _refusal(x.dtype, p or x.shape[-1], n))


def _refusal(dtype: torch.dtype, p: int, n: int) -> str | None:
    if dtype == torch.float64:
        return "the kernels compute in float32, and x is float64"
    if max(p, n) > MAX_SIZE:
        return f"the kernels take p and n up to {MAX_SIZE}, got p={p}, n={n}"
    return None


# ---------------------------------------------------------------------------------------------------- validation


def _is_pair(value, name: str) -> bool:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name}: expected a tensor or a pair (forward, backward), got {len(value)} values")
        return True
    return False


def _describe(value) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return f"{type(value).__name__} {value!r}" if not isinstance(value, (tuple, list)) else f"{len(value)} values"


def _expect(name: str, value, shape: tuple[int, ...], axes: str, x: Tensor, dtypes=FLOATS, optional=True) -> None:
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor {axes} = {shape}, got {_describe(value)}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {axes} = {shape}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: expected dtype {names}, got {str(value.dtype).removeprefix('torch.')}")
    expect_device("x", x, **{name: value})


def _validate(
    x: Tensor,
    forward: Direction,
    backward: Direction | None,
    chunk_size: int | None,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    seq_idx: Tensor | None,
    initial_states: tuple[Tensor | None, Tensor | None],
    shift: bool,
) -> None:
    if not isinstance(x, Tensor) or x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x: expected a tensor (b, l, h, p) with no empty dimension, got {_describe(x)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"x: expected a float dtype, got {x.dtype}")
    b, l, h, p = x.shape
    same = FLOATS if autocasts(x) else (x.dtype,)
    g = n = 0
    for direction, which in ((forward, "forward "), (backward, "backward ")):
        if direction is None or (direction is forward and which == "backward "):
            continue
        which = "" if backward is None or backward is forward else which
        _expect(f"{which}dt", direction.dt, (b, l, h), "(b, l, h)", x, optional=False)
        _expect(f"{which}A", direction.A, (h,), "(h)", x, optional=False)
        B = direction.B
        if not isinstance(B, Tensor) or B.dim() != 4 or B.shape[:2] != x.shape[:2] or 0 in B.shape or h % B.shape[2]:
            raise ValueError(
                f"{which}B: expected (b, l, g, n) = ({b}, {l}, g, n) with g dividing h = {h}, got {_describe(B)}"
            )
        if direction is forward:
            g, n = B.shape[2:]
        _expect(f"{which}B", B, (b, l, g, n), "(b, l, g, n)", x, same)
        _expect(f"{which}C", direction.C, (b, l, g, n), "(b, l, g, n)", x, same, optional=False)
        _expect(f"{which}dt_bias", direction.dt_bias, (h,), "(h)", x)
    if backward is not None and (forward.dt_bias is None) != (backward.dt_bias is None):
        raise ValueError("dt_bias: expected one for both directions or for neither, got one for a single direction")
    if isinstance(D, Tensor) and D.dim() == 2:
        _expect("D", D, (h, p), "(h, p)", x)
    else:
        _expect("D", D, (h,), "(h) or (h, p)", x)
    _expect("z", z, (b, l, h, p), "(b, l, h, p)", x, same)
    _expect("seq_idx", seq_idx, (b, l), "(b, l)", x, (torch.int32, torch.int64))
    for state, which in zip(initial_states, ("forward", "backward"), strict=True):
        _expect(f"initial_states ({which})", state, (b, h, p, n), "(b, h, p, n)", x)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size: expected a positive int or None, got {chunk_size!r}")
    if not isinstance(dt_softplus, bool):  # mamba-ssm has initial_states in this place
        raise ValueError(f"dt_softplus: expected True or False, got {_describe(dt_softplus)}")
    if len(dt_limit) != 2 or not 0.0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit: expected (least, largest) with 0 <= least <= largest, got {dt_limit!r}")
    if debugging():
        _validate_values(forward, backward, seq_idx)


def debugging() -> bool:
    """Whether values are checked, too (`BIMAMBA_DEBUG=1`)."""
    return os.environ.get("BIMAMBA_DEBUG", "0") not in ("", "0") and not torch.compiler.is_compiling()


def _validate_values(forward: Direction, backward: Direction | None, seq_idx: Tensor | None) -> None:
    """What only the values show; waits for the device, so it runs under `BIMAMBA_DEBUG=1` alone."""
    for A in {id(d.A): d.A for d in (forward, backward) if d is not None}.values():
        if not (A < 0).all():
            raise ValueError(f"A: expected negative values, got a largest of {A.max().item():g}")
    if seq_idx is not None and (seq_idx.diff(dim=1) < 0).any():
        row = int((seq_idx.diff(dim=1) < 0).any(dim=1).nonzero()[0])
        raise ValueError(f"seq_idx: expected values that do not decrease along a row, got a decrease in row {row}")
