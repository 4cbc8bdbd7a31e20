"""Launch configurations by rule: from shape, dtype and device, never by autotuning.

A rule costs nothing at run time and gives the same bits on every run; autotuning costs the peers 100-160 s at first use.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
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

    @property
    def p2(self) -> int:
        return max(16, _power_of_two(self.p))

    @property
    def n2(self) -> int:
        return max(16, _power_of_two(self.n))

    @property
    def limited(self) -> bool:
        least, largest = self.dt_limit
        return largest != math.inf or least > 0.0 or not self.dt_softplus

    @property
    def precision(self) -> str:
        """Of products of float32 tiles; bf16 and fp16 tiles have one way only."""
        return "tf32" if self.allow_tf32 else "ieee"

    @property
    def two_matrices(self) -> bool:
        """One C B^T serves both triangles only if the directions share B, C and the row that is read."""
        return self.bidirectional and (self.untied or self.shift)

    def chunks(self, config: Config) -> int:
        return -(-self.l // config.chunk)

    def parts(self, config: Config) -> int:
        """Row blocks that one program of the later stages owns."""
        return -(-self.l // config.rows)

    def states_shape(self, config: Config) -> tuple[int, ...]:
        return (self.b, self.chunks(config), self.h, self.directions, self.p2, self.n2)

    def rows_shape(self, config: Config) -> tuple[int, ...]:
        return (self.b, self.h, self.sets, 2, self.chunks(config) * config.chunk)


@dataclass(frozen=True)
class Config:
    """How it is computed. Blocks of p and n divide the padded sizes; `*_heads` divide h / g."""

    chunk: int  # rows between two stored states
    halves: int  # 2: a program owns half a chunk and moves the entering state over the other half
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
    grad_x_heads: int = 1
    grad_x_warps: int = 4
    grad_x_stages: int = 2
    grad_bc_heads: int = 1
    grad_bc_warps: int = 4
    grad_bc_stages: int = 2

    @property
    def rows(self) -> int:
        return self.chunk // self.halves


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


def choose(problem: Problem, saved: bool, backward: bool) -> Config:
    """The configuration of a pass. Both passes must agree on `chunk` where the states are `saved` between them."""
    config = _rule(problem, saved, backward)
    return replace(config, **_forced) if _forced else config


@functools.lru_cache(maxsize=1024)
def _rule(problem: Problem, saved: bool, backward: bool) -> Config:
    device = _device(problem.device)
    wide = problem.dtype == torch.float32
    halves = 1 if wide or problem.untied or problem.shift or problem.l <= 64 else 2
    rows = min(32 if wide else 64, max(16, _power_of_two(problem.l)))
    block_p = min(problem.p2, 32 if wide else 64)
    block_n = min(problem.n2, 32 if wide else 128)
    heads = problem.h // problem.g
    programs = problem.b * problem.h * problem.directions
    walk = programs * (problem.p2 // block_p) * (problem.n2 // block_n) >= 2 * device.processors
    parts = problem.b * -(-problem.l // rows) * problem.g
    tma = device.has_tma and _fits_descriptors(problem, block_p, block_n) and not wide
    return Config(
        chunk=rows * halves,
        halves=halves,
        block_p=block_p,
        block_n=block_n,
        tma=tma,
        walk=walk,
        states_block_n=block_n,
        output_heads=_divisor(heads, 6),
        grad_x_heads=_divisor(heads, 6),
        grad_bc_heads=_divisor(heads, max(1, heads * parts // (2 * device.processors))),
        grad_bc_warps=8 if block_n > 64 else 4,
        output_stages=1 if wide else 2,
        grad_x_stages=1 if wide else 2,
        grad_bc_stages=1 if wide else 2,
    )


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
    tma = torch.version.hip is None and properties.major >= 9
    return Device(properties.multi_processor_count, tma, getattr(properties, "shared_memory_per_block_optin", 65536))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _divisor(heads: int, most: int) -> int:
    """The largest divisor of `heads` that is at most `most`."""
    return max(d for d in range(1, min(heads, max(1, most)) + 1) if heads % d == 0)
