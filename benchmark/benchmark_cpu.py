"""CPU: forward and backward of the bidirectional scan against two flipped calls of a plain chunked causal scan.

    python benchmark/benchmark_cpu.py                       # b8 l1024 h8 p32 g1 n32, float32
    python benchmark/benchmark_cpu.py --length 4096 --chunks 16 32 64 128

The baseline is Mamba-2's chunked algorithm as its paper lists it (Dao and Gu 2024, listing 1): segment sums, one
einsum a step, one direction; bidirectional by flipping, as users without a bidirectional kernel do.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from bimamba.ops.ssd.chunked import best_chunk, ssd_chunked
from bimamba.ops.ssd.reference import Direction


def segment_sums(a: Tensor) -> Tensor:
    """(..., q) -> (..., q, q): the sum of a over (j, i], -inf above the diagonal."""
    s = a.cumsum(-1)
    keep = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).tril()
    return (s[..., :, None] - s[..., None, :]).masked_fill(~keep, -torch.inf)


def plain_causal(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, q: int) -> Tensor:
    """x (b, l, h, p), delta (b, l, h), A (h), B and C (b, l, 1, n); l must be a multiple of q."""
    h = x.shape[2]
    xd, a = x * delta[..., None], delta * A
    B, C = B.expand(-1, -1, h, -1), C.expand(-1, -1, h, -1)
    xd, B, C, a = (t.unflatten(1, (-1, q)) for t in (xd, B, C, a))
    a = a.permute(0, 3, 1, 2)  # (b, h, c, q)
    s = a.cumsum(-1)
    y = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, torch.exp(segment_sums(a)), xd)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, torch.exp(s[..., -1:] - s), xd)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    passing = torch.exp(segment_sums(torch.nn.functional.pad(s[..., -1], (1, 0))))
    states = torch.einsum("bhzc,bchpn->bzhpn", passing, states)[:, :-1]
    y = y + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, torch.exp(s))
    return y.flatten(1, 2)


def flipped(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, q: int) -> Tensor:
    forward = plain_causal(x, delta, A, B, C, q)
    return forward + plain_causal(x.flip(1), delta.flip(1), A, B.flip(1), C.flip(1), q).flip(1)


def milliseconds(step, repeats: int) -> float:
    step(), step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in dict(batch=8, length=1024, heads=8, headdim=32, dstate=32, repeats=7).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--chunks", type=int, nargs="*", help="chunk lengths to time; default: the one that is chosen")
    args = parser.parse_args()
    torch.manual_seed(0)
    b, l, h, p, n = args.batch, args.length, args.heads, args.headdim, args.dstate
    inputs = [
        torch.randn(b, l, h, p),
        torch.rand(b, l, h) * 0.1,
        -1 - 15 * torch.rand(h),
        torch.randn(b, l, 1, n) / n**0.5,
        torch.randn(b, l, 1, n),
    ]
    inputs = [t.requires_grad_() for t in inputs]
    dy = torch.randn(b, l, h, p)

    def step(scan):
        return lambda: torch.autograd.grad(scan(*inputs), inputs, dy)

    def bidirectional(x: Tensor, *parameters: Tensor, q: int) -> Tensor:
        direction = Direction(*parameters)
        return ssd_chunked(x, direction, direction, chunk_size=q, return_final_states=False)[0]

    y = bidirectional(*inputs, q=64)
    error = ((y - flipped(*inputs, 64)).norm() / y.norm()).item()
    print(f"b{b} l{l} h{h} p{p} g1 n{n} float32, {torch.get_num_threads()} threads; relative difference {error:.1e}")
    base = {q: milliseconds(step(lambda *t, q=q: flipped(*t, q)), args.repeats) for q in (32, 64, 128)}
    for q, ms in base.items():
        print(f"two flipped causal scans, chunk {q:<4} {ms:8.1f} ms")
    fastest = min(base.values())
    for q in args.chunks or [best_chunk(l, p, n)]:
        ms = milliseconds(step(lambda *t, q=q: bidirectional(*t, q=q)), args.repeats)
        print(f"bidirectional scan, chunk {q:<10} {ms:8.1f} ms   {ms / fastest:.2f} of the fastest flipped form")


if __name__ == "__main__":
    main()
