"""Padding waste and samples per second of padded, bucketed and packed batches, at lengths as of mouse enhancers.

    python benchmark/benchmark_packing.py                                  # this machine's CPU, a small model, a minute
    python benchmark/benchmark_packing.py --device cuda --dim 256 --depth 8 --batch 64 --steps 20

The lengths are drawn like those of Genomic Benchmarks' `dummy_mouse_enhancers_ensembl` (1,210 of 331 to 4,776 bases,
median 2,381, deviation 984): a normal distribution, cut. A step is forward, backward and AdamW (CUDA: bf16 autocast).
Waste is the part of the cells of a batch that hold no token. Everything measured sees the same number of sequences.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F

from bimamba.data.collate import collate
from bimamba.data.samplers import TrainBatches
from bimamba.data.sequences import TokenRows
from bimamba.models import Classifier
from bimamba.nn import Attention, BiMamba2
from bimamba.packing import Packing
from bimamba.spec import DataSpec

SHORTEST, LONGEST, MEDIAN, DEVIATION, COUNT = 331, 4776, 2381, 984.4, 1210


def sequences(scale: float) -> TokenRows:
    """Random tokens in sequences of those lengths, times `scale`."""
    rng = np.random.default_rng(0)
    lengths = (rng.normal(MEDIAN, DEVIATION, COUNT).clip(SHORTEST, LONGEST) * scale).astype(np.int64)
    offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
    return TokenRows(torch.from_numpy(rng.integers(1, 5, int(offsets[-1])).astype(np.uint8)), offsets, {})


def batches(rows: TokenRows, how: str, size: int, pack_length: int) -> list[dict]:
    """The batches of an epoch, as the DataModule makes them."""
    lengths = rows.lengths.numpy() if how == "bucketed" else None
    made = []
    for draw in TrainBatches(len(rows), size, seed=0, lengths=lengths, drop_last=True):
        index = torch.from_numpy(draw.rows)
        inputs, mask, *packing = rows.packed(index, pack_length) if how == "packed" else rows.batch(index)
        made.append(collate(inputs, [""] * size, index % 2, mask, *packing))
    return made


def rate(model: torch.nn.Module, given: list[dict], size: int, device: torch.device) -> tuple[float, float]:
    """Samples per second, by the median step and over all steps; the first batches are warm-up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seconds = []
    for batch in [*given[:3], *given]:
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items() if k != "id"}
        _wait(device)
        start = time.perf_counter()
        packing = [batch[name] for name in Packing._fields] if "seq_idx" in batch else []
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(batch["inputs"], batch["mask"], *packing)
        F.binary_cross_entropy_with_logits(logits[:, 0].float(), batch["label"].float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    seconds = seconds[3:]
    return size / statistics.median(seconds), size * len(seconds) / sum(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--mixer", default="bimamba2", choices=["bimamba2", "attention"])
    for name, value in dict(dim=32, depth=2, batch=16, steps=4, pack=4).items():
        parser.add_argument(f"--{name}", type=int, default=value, help="pack: pack_length over the longest sequence")
    parser.add_argument("--scale", type=float, default=1.0, help="all lengths times this")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = sequences(args.scale)
    longest = int(rows.lengths.max())
    spec = DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=longest)
    heads = min(64, args.dim)

    def mixer(d: int) -> torch.nn.Module:
        return BiMamba2(d, headdim=heads) if args.mixer == "bimamba2" else Attention(d, headdim=heads)

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lengths = rows.lengths.float()
    print(f"{where}; {args.mixer}, width {args.dim}, depth {args.depth}; batches of {args.batch}")
    print(f"lengths {int(lengths.min())} to {longest}, median {lengths.median():.0f}; rows of {args.pack * longest}")
    print(f"{'':10}{'waste':>8}{'rows x width':>16}{'batch made in':>15}{'samples/s (all steps)':>24}{'gain':>7}")
    base = None
    for how in ("padded", "bucketed", "packed"):
        start = time.perf_counter()
        made = batches(rows, how, args.batch, args.pack * longest)
        making = 1e3 * (time.perf_counter() - start) / len(made)
        cells, real = (sum(f(b["mask"]) for b in made) for f in (torch.Tensor.numel, lambda m: int(m.sum())))
        shape = " x ".join(f"{statistics.mean(b['mask'].shape[i] for b in made):.0f}" for i in (0, 1))
        torch.manual_seed(0)
        model = Classifier(spec, args.dim, args.depth, mixer=mixer).to(device)
        median, overall = rate(model, made[: args.steps], args.batch, device)
        base = base or overall
        print(
            f"{how:10}{1 - real / cells:8.1%}{shape:>16}{making:12.2f} ms{median:12.1f} ({overall:.1f})".ljust(73)
            + f"{overall / base:7.2f}"
        )


if __name__ == "__main__":
    main()
