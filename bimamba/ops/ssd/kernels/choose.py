"""Launch configurations by rule: from shape, dtype and device, never by autotuning.

A rule costs nothing at run time and gives the same bits on every run; autotuning costs the peers 100-160 s at first
use.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True, eq=False)  # compared by identity: see `problem_of`
class Problem:
    """What is computed: sizes as the public functions name them, and the form of the operator."""

    b: int
    l: int
    h: int
    g: int
    p: int
    n: int
    dtype: torch.dtype
    device: torch.device
    bidirectional: bool = True
    untied: bool = False
    shift: bool = False
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    allow_tf32: bool = False

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def sets(self) -> int:
        """Sets of row data (delta and its sums): one a direction where directions have parameters of their own."""
        return 2 if self.untied else 1

    @functools.cached_property
    def p2(self) -> int:
        return max(16, _power_of_two(self.p))

    @functools.cached_property
    def n2(self) -> int:
        return max(16, _power_of_two(self.n))

    @functools.cached_property
    def limited(self) -> bool:
        least, largest = self.dt_limit
        return largest != math.inf or least > 0.0 or not self.dt_softplus

    @property
    def precision(self) -> str:
        """Of products of float32 tiles; bf16 and fp16 tiles have one way only."""
        return "tf32" if self.allow_tf32 else "ieee"

    @property
    def sizes(self) -> dict[str, Any]:
        """What every stage's kernels are compiled for."""
        sizes = dict(L=self.l, H=self.h, G=self.g, P=self.p, N=self.n, P2=self.p2, N2=self.n2)
        return sizes | dict(SHIFT=self.shift, PRECISION=self.precision)

    @property
    def two_matrices(self) -> bool:
        """One C B^T serves both triangles only if the directions share B, C and the row that is read."""
        return self.bidirectional and (self.untied or self.shift)

    def chunks(self, config: Config | Layout) -> int:
        """Chunks whose states are stored: with `fill`, a whole number of pairs."""
        return -(-self.l // (config.chunk * config.fill)) * config.fill

    def parts(self, config: Config) -> int:
        """Row blocks that one program of the later stages owns."""
        return -(-self.l // config.rows)

    def row_blocks(self, config: Config) -> int:
        """Those of all sequences, and such as lie wholly beyond the end: a whole number of chunks a sequence."""
        return self.b * self.chunks(config) * config.halves

    def states_shape(self, config: Config | Layout) -> tuple[int, ...]:
        return (self.b, self.chunks(config), self.h, self.directions, self.p2, self.n2)

    def rows_shape(self, config: Config | Layout) -> tuple[int, ...]:
        return (self.b, self.h, self.sets, 3, self.chunks(config) * config.chunk)

    def lines(self, config: Config) -> int:
        """Pieces of d(a) a row: see `grad_dt.py`."""
        return 4 + 2 * (self.n2 // config.grad_bc_block_n)

    def lines_shape(self, config: Config) -> tuple[int, ...]:
        return (self.b, self.h, self.sets, self.lines(config), self.chunks(config) * config.chunk)


problem_of = functools.lru_cache(maxsize=4096)(Problem)  # one object a form: what is known of it is found at once


class Layout(NamedTuple):
    """All that shapes of saved tensors depend on."""

    chunk: int  # rows between two stored states
    halves: int = 1  # 2: stages work on half a chunk and move the entering state over the other half
    fill: int = 1  # 2: the forward walk passes two chunks a step, and the output stage writes the states between


@dataclass(frozen=True, eq=False)  # compared by identity, as problems are
class Config:
    """How it is computed. Blocks of p and n divide the padded sizes; `*_heads` divide h / g."""

    chunk: int  # chunk, halves, fill: see Layout
    halves: int
    fill: int
    block_p: int
    block_n: int
    tma: bool
    walk: bool  # one program walks over all chunks; else chunks in parallel, then passing
    states_block_n: int
    states_warps: int = 4
    states_stages: int = 2
    passing_block: int = 256
    passing_warps: int = 1
    passing_stages: int = 16
    output_heads: int = 1
    output_warps: int = 4
    output_stages: int = 2
    together: bool = False  # grad_x and grad_bc in one launch, where the states are saved
    group: int = 1  # see gradients.py
    grad_warps: int = 4
    grad_x_heads: int = 1
    grad_x_stages: int = 2
    grad_x_row_tma: bool = False  # its sums and step sizes, too, by descriptors
    grad_bc_block_n: int = 64
    grad_bc_heads: int = 1
    grad_bc_stages: int = 2

    @property
    def rows(self) -> int:
        return self.chunk // self.halves


def gradient_settings(problem: Problem, config: Config, seq: bool) -> dict[str, Any]:
    """What the kernels of dx and of dB, dC take, by themselves and in one launch. `seq`: whether it is there."""
    settings = dict(CHUNKS=problem.chunks(config), Q=config.rows, HALVES=config.halves, LINES=problem.lines(config))
    settings |= dict(BLOCK_P=config.block_p, HAS_SEQ=seq, TMA=config.tma, num_warps=config.grad_warps)
    return problem.sizes | settings


_forced: dict = {}


@contextlib.contextmanager
def forced(**fields):
    """Within it every choice takes these fields: for tests of each configuration, and for measurements."""
    global _forced
    before, _forced = _forced, {**_forced, **fields}
    try:
        yield
    finally:
        _forced = before


_replaced = functools.lru_cache(maxsize=1024)(replace)


def choose(problem: Problem, saved: bool, backward: bool) -> Config:
    """The configuration of a pass; `saved`: the states are kept between forward and backward pass."""
    config = _rule(problem, layout(problem, saved), backward)
    return _replaced(config, **_forced) if _forced else config


def layout(problem: Problem, saved: bool) -> Layout:
    """Comparisons only, so sizes may be symbolic.

    H100, b8 l2048 h24 p64 n64 bf16, us: chunk 64: states 75, output 80, grad_x 114, grad_bc 138; filled in: states 56,
    output 99; chunk 128 in halves: states 55, output 74, grad_x 144, grad_bc 230. So chunk 64 where the gradients find
    the states (filled in: 2-8 % faster where heads are few, but 2-4 % slower up to n = 32, whose states are small), and
    chunk 128 where no gradient follows, and, for its memory, where the states are recomputed.
    """
    if "chunk" in _forced or "halves" in _forced or "fill" in _forced:
        halves = _forced.get("halves", 1)
        return Layout(_forced.get("chunk", 64 * halves), halves, _forced.get("fill", 1))
    if problem.dtype == torch.float32:
        return Layout(16 if problem.l <= 16 else 32)
    if problem.l <= 64:
        return Layout(16 if problem.l <= 16 else 32 if problem.l <= 32 else 64)
    if problem.untied or problem.shift or problem.n > 128 or (saved and (problem.n > 64 or problem.n <= 32)):
        return Layout(64)
    return Layout(64, fill=2) if saved else Layout(128, halves=2)


LITTLE = 2**21  # elements of x


@functools.lru_cache(maxsize=1024)
def _rule(problem: Problem, layout: Layout, backward: bool) -> Config:
    """Times in us, H100, bf16, b8 l2048 h24 p64 g1 with n = 64 and n = 128, unless said otherwise."""
    device = _device(problem.device)
    chunk, halves, fill = layout
    exact = problem.dtype == torch.float32  # products on the plain units: small tiles, registers and no pipeline
    block_p = min(problem.p2, 32 if exact else 64)
    roomy = device.shared_memory >= 160 * 1024  # data centre chips; others hold one tile of each kind
    block_n = min(problem.n2, 32 if exact else 128 if roomy else 64)
    narrow = min(block_n, 64)
    heads = problem.h // problem.g
    # Little work is bound by launches: as few as can be, and no descriptors, each of which costs the host 12 us a
    # launch
    little = problem.b * problem.l * problem.h * problem.p <= LITTLE and problem.l <= 2048
    tma = device.has_tma and not exact and not little and _fits_descriptors(problem, block_p, block_n)
    walks = problem.b * problem.h * problem.directions * (problem.p2 // block_p) * (problem.n2 // narrow)
    # For gradients a walk a processor is enough: their chunks are short, and passing them costs as much as the states
    # themselves. Of half of n, so that there are two. H200, forward+backward by passing, walks, walks of half of n: 128
    # walks (b8 l16384 h8) 1390, 1372, 1298; b16 l2048 h4 212, 204, 198; n 128, b4 l8192 h8 672, 619, 596; 144 walks
    # 1648, 1598, 1518; 96 walks 1049, 1131, 1060. Forward alone, n 64, 128 walks: 396, 443, 414 (H100: 452, 460,
    # 436), so the forward pass only where n is large: n 128, b4 l8192 h8, gradients walked: 619 passed forward, 595
    # walked; no gradients, H100: 214 passed, 184 and 185 walked
    few = (halves == 1 if backward else block_n > 64) and not little and narrow > 32
    few = few and 0.95 * device.processors <= walks < 2 * device.processors
    walk_rows = chunk if backward else chunk * fill
    row_blocks = problem.b * -(-problem.l // (chunk // halves)) * problem.g
    # Parts of a group's heads, so that there are two programs a processor. All 24 heads in one program: output and the
    # states' stage 127, 129.5 by 12, 133 by 8, 136 by 6
    parts = max(1, 2 * device.processors // row_blocks)
    several = _divisor(heads, min(24, max(1, heads // parts)))
    # Both gradients in one launch, forward+backward: 487 -> 452, b128 l196 h12 458 -> 418, b64 l1024 h4 391 -> 360, h12
    # p128 580 -> 500, untied 568 -> 558, causal 360 -> 327; n 128, grad_x by as many programs as grad_bc: 815 -> 722,
    # causal 521 -> 464. But n 256 360 -> 370, p and n 128 938 -> 1026, float32 b2 l16384 h4 p16 n16 384 -> 393, and in
    # halves, where the states are recomputed, 612 -> 717
    blocks = problem.n2 // narrow
    together = not exact and blocks * (problem.p2 // block_p) <= 2
    return Config(
        chunk=chunk,
        halves=halves,
        fill=fill,
        block_p=block_p,
        block_n=block_n,
        tma=tma,
        walk=little or few or walks >= 2 * device.processors,
        # n 64: 86 with 2 stages and 76 with 3 over 64 rows; 55 and 62 over 128. n 128: blocks of 64 89, of 128 102
        states_block_n=narrow // 2 if few else narrow,
        states_stages=1 if exact else 3 if roomy and (walk_rows == 64 or block_n > 64) else 2,
        # Halves: 81 with 2 stages, 74 with 3; filling in 99 and 113; whole 85 and 80. n 128: 1 stage 140, 2 stages 114,
        # in halves 148 and 158
        output_heads=several,
        output_stages=_stages(
            exact or not roomy, 1 if block_n > 64 and halves == 2 else 3 if block_n <= 64 and fill == 1 else 2
        ),
        together=together,
        # n 64: one of each kind a multiprocessor 454, two of a kind 470; n 128: 762 and 722
        group=device.processors if blocks == 1 else max(1, device.processors // (2 * blocks)),
        # n 64: 126 with 2 stages, 114 with 3, 119 with plain loads; in halves 144; untied 609 and, with 2 stages, whose
        # buffers leave room for a second program, 568. n 128: 204, by descriptors 239
        grad_x_heads=_divisor(heads, several // blocks) if together else several,
        grad_x_stages=_stages(
            exact or not roomy, 1 if block_n > 64 else 2 if halves == 2 or problem.two_matrices else 3
        ),
        # The copy engine writes to multiples of 128 bytes, and a stage's buffers lie side by side
        grad_x_row_tma=block_n <= 64 and chunk // halves >= 32,
        # n 64: 137 with 2 stages, 176 with 3; in halves 310, 224 with 1. n 128: blocks of 64 241, of 128 249
        grad_bc_block_n=narrow,
        # Its parts are summed through memory: 137 in one part (256 programs), 193 in two
        grad_bc_heads=heads if little else _divisor(heads, max(1, heads // parts)),
        grad_bc_stages=_stages(exact or not roomy, 1 if halves == 2 else 2),
    )


def _stages(single: bool, best: int) -> int:
    return 1 if single else best


def _fits_descriptors(problem: Problem, block_p: int, block_n: int) -> bool:
    """Descriptors have no column mask, and count rows in int32."""
    size = problem.b * problem.l * problem.h * problem.directions * problem.p2
    return problem.p % block_p == 0 and problem.n % block_n == 0 and size < 2**31 * 16


@dataclass(frozen=True)
class Device:
    processors: int
    has_tma: bool
    shared_memory: int


@functools.lru_cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":  # the interpreter
        return Device(processors=4, has_tma=False, shared_memory=232448)
    properties = torch.cuda.get_device_properties(device)
    # Hopper. On Blackwell Triton 3.6 fails to pipeline the walk with descriptors (3.9 does not): pointers serve there
    tma = torch.version.hip is None and properties.major == 9
    return Device(properties.multi_processor_count, tma, getattr(properties, "shared_memory_per_block_optin", 65536))


def _power_of_two(size: int) -> int:
    power = 1
    while power < size:  # comparisons: `size` may be symbolic
        power *= 2
    return power


def _divisor(heads: int, most: int) -> int:
    """The largest divisor of `heads` that is at most `most`."""
    return max(d for d in range(1, min(heads, max(1, most)) + 1) if heads % d == 0)
