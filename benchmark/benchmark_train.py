"""Training steps (forward, backward, AdamW; bf16 autocast) of the classifier and of what a user would run instead.

    python benchmark/benchmark_train.py                                   # a GPU; about 10 minutes with the peers
    python benchmark/benchmark_train.py --shapes patches dna_1k --models bimamba transformer
    python benchmark/benchmark_train.py --longest                         # the longest sequence that fits
    python benchmark/benchmark_train.py --device cpu --tiny               # does it run

Models, of one width and depth, embedding, pooling and head:

    bimamba      this package's classifier;  +mem_eff: use_mem_eff_path;  +checkpoint: checkpoint_blocks;
                 +compile: torch.compile;  +reduce: torch.compile with mode=reduce-overhead;  +graph: the whole step as
                 one CUDA graph;  +checkpoint+graph: both
    flip         the same blocks, bidirectional Mamba-2 made of two causal ones: mamba-ssm's Triton scan and gated norm,
                 PyTorch's convolution, and flips;  +graph
    transformer  pre-norm attention (torch's scaled_dot_product_attention) and GELU MLP, as many parameters;  +graph

Columns: tokens/s and samples/s of the median step; peak memory, and that beyond parameters, optimizer and inputs
("activations"); GPU launches of one block, forward and backward; and the share of the GPU's peak bf16 throughput. FLOP
counted are those that the mathematics needs: 6 a token and weight of a linear layer (forward 2, backward 4),
12 l d_model a token of attention, and 18 p n a token, head and direction of the scan as a recurrence (forward
2 p n each to decay, add and read). What a kernel computes beyond that, or again, does not count.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from scans import FOLDER, hardware, peer
from torch import Tensor, nn

from bimamba.models import Classifier
from bimamba.nn import Attention, BiMamba2, NucleotideEmbedding, PatchEmbedding, PixelEmbedding
from bimamba.spec import DataSpec
from bimamba.tasks.compilation import compile_network

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s of the SXM parts, NVIDIA's data sheets


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    d_model: int
    depth: int
    embedding: type = NucleotideEmbedding

    def spec(self) -> DataSpec:
        if self.embedding is NucleotideEmbedding:
            return DataSpec("sequence", "binary", ("no", "yes"), alphabet="ACGTN", max_length=self.length)
        names = tuple(str(i) for i in range(10))
        side = round(self.length**0.5) * (4 if self.embedding is PatchEmbedding else 1)
        return DataSpec(
            "image", "multiclass", names, channels=3, height=side, width=side, mean=(0.5,) * 3, std=(0.25,) * 3
        )

    def batch_of(self, device: str) -> tuple[Tensor, Tensor]:
        spec = self.spec()
        if spec.kind == "sequence":
            inputs = torch.randint(1, 5, (self.batch, self.length), device=device)
            return inputs, torch.randint(0, 2, (self.batch,), device=device)
        inputs = torch.randn(self.batch, 3, *spec.image_shape[1:], device=device)
        return inputs, torch.randint(0, 10, (self.batch,), device=device)


SHAPES = {
    "patches": Shape(512, 64, 192, 12, PatchEmbedding),
    "pixels": Shape(64, 1024, 256, 8, PixelEmbedding),
    "dna_1k": Shape(128, 1000, 256, 8),
    "dna_16k": Shape(8, 16384, 256, 8),
    "dna_131k": Shape(1, 131072, 256, 8),
}
TINY = {
    "patches": Shape(4, 16, 32, 2, PatchEmbedding),
    "pixels": Shape(2, 64, 32, 2, PixelEmbedding),
    "dna_1k": Shape(2, 100, 32, 2),
}
OPTIONS = ("", "+mem_eff", "+checkpoint", "+compile", "+reduce", "+graph", "+mem_eff+graph", "+checkpoint+graph")
MODELS = (*(f"bimamba{option}" for option in OPTIONS), "transformer", "transformer+graph", "flip", "flip+graph")


class FlipMamba2(BiMamba2):
    """The block as a user of mamba-ssm builds it: the same parameters, two calls of the causal scan, and flips."""

    def _is_one_node(self, *_) -> bool:
        return False

    def _after_projection(self, projected: Tensor, mask: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

        scan = peer_scan()
        assert mask is None and seq_idx is None
        n = self.ngroups * self.d_state
        z, xBC, dt, _ = projected.split(
            [
                self.d_inner,
                d := self.conv1d.in_channels,
                self.nheads,
                projected.shape[-1] - self.d_inner - d - self.nheads,
            ],
            dim=-1,
        )
        xBC = F.silu(F.conv1d(xBC.mT, self.conv1d.weight, self.conv1d.bias, padding="same", groups=xBC.shape[-1]).mT)
        x, B, C = xBC.contiguous().split([self.d_inner, n, n], dim=-1)
        t = dict(
            x=x.unflatten(-1, (self.nheads, self.headdim)),
            dt=dt,
            A=-torch.exp(self.A_log.float()),
            B=B.unflatten(-1, (self.ngroups, self.d_state)),
            C=C.unflatten(-1, (self.ngroups, self.d_state)),
            D=self.D,
            dt_bias=self.dt_bias,
        )
        back = {k: v.flip(1) if k in ("x", "dt", "B", "C") else v for k, v in t.items() if k != "D"}
        y = (scan(t) + scan(back).flip(1)).flatten(-2)
        return self.out_proj(rmsnorm_fn(y, self.norm.weight, None, z=z, eps=self.norm.eps, norm_before_gate=True))


_peer: list[Callable | None] = []


def peer_scan() -> Callable | None:
    if not _peer:
        _peer.append(peer())
    return _peer[0]


def build(name: str, shape: Shape, headdim: int) -> Classifier:
    kind, *options = name.split("+")
    common = dict(d_model=shape.d_model, depth=shape.depth, embedding=shape.embedding)
    if kind == "transformer":
        ours = sum(p.numel() for p in BiMamba2(shape.d_model, headdim=headdim).parameters())
        attention = sum(p.numel() for p in Attention(shape.d_model, headdim=headdim).parameters())
        ratio = (ours - attention) / (2 * shape.d_model**2)
        mixer = partial(Attention, headdim=headdim)
        return Classifier(shape.spec(), mixer=mixer, mlp="gelu", mlp_ratio=ratio, **common)
    mixer = partial(FlipMamba2 if kind == "flip" else BiMamba2, headdim=headdim, use_mem_eff_path="mem_eff" in options)
    return Classifier(shape.spec(), mixer=mixer, checkpoint_blocks="checkpoint" in options, **common)


def flops(net: Classifier, shape: Shape) -> float:
    """Of a training step, see above."""
    tokens = shape.batch * shape.length
    total = 0.0
    for module in net.backbone.modules():
        if isinstance(module, nn.Linear):
            total += 6.0 * module.weight.numel() * tokens
        elif isinstance(module, Attention):
            total += 12.0 * shape.length * shape.d_model * tokens
        elif isinstance(module, BiMamba2):
            total += 2 * 18.0 * module.d_inner * module.d_state * tokens
    return total


def loss_of(net: Classifier, inputs: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits = net(inputs).float()
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    return F.cross_entropy(logits, labels)


class Step:
    """Forward, backward and AdamW, each time it is called.

    Args:
        net: whose parameters are trained. loss: of one batch. graph: as one CUDA graph.
    """

    def __init__(self, net: nn.Module, loss: Callable[[], Tensor], graph: bool = False) -> None:
        self.loss = loss
        cuda = next(net.parameters()).is_cuda
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=cuda, capturable=graph)
        self.graph: torch.cuda.CUDAGraph | None = None
        if graph:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.run()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.run()

    def run(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()


def seconds(step: Step, steps: int, cuda: bool) -> float:
    """Median of a step, call and device together."""
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def launches(net: Classifier, shape: Shape, device: str) -> str:
    """GPU kernels of one block under autocast: forward + backward."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    block = net.backbone.blocks[0]
    x = torch.randn(shape.batch, shape.length, shape.d_model, device=device, requires_grad=True)

    def forward() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return block(x, None, None)

    def kernels(f: Callable) -> int:
        with profile(activities=[ProfilerActivity.CUDA]) as watch:
            f()
            torch.cuda.synchronize()
        return sum(e.device_type == DeviceType.CUDA and not e.name.startswith("Mem") for e in watch.events())

    dy = torch.randn_like(x)
    forward().backward(dy)
    ahead = kernels(forward)
    block.zero_grad(set_to_none=True)  # as a step does: nothing to add to
    x.grad = None
    y = forward()
    return f"{ahead}+{kernels(lambda: y.backward(dy))}"


def measure(name: str, label: str, shape: Shape, device: str, steps: int, headdim: int) -> dict:
    cuda = device.startswith("cuda")
    row = {"shape": label, "b": shape.batch, "l": shape.length, "d": shape.d_model, "depth": shape.depth, "model": name}
    torch.manual_seed(0)
    net = build(name, shape, headdim).to(device)
    row["parameters"] = sum(p.numel() for p in net.parameters())
    options = name.split("+")[1:]
    counted = launches(net, shape, device) if cuda and not options else ""
    net.zero_grad(set_to_none=True)
    batch = shape.batch_of(device)
    if "compile" in options or "reduce" in options:
        compile_network(net, "reduce-overhead" if "reduce" in options else None)
    start = time.perf_counter()
    step = Step(net, partial(loss_of, net, *batch), graph="graph" in options)
    for _ in range(3):
        step()
    if cuda:
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    before = 0
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    median = seconds(step, steps, cuda)
    tokens = shape.batch * shape.length
    row |= {"ms": 1e3 * median, "tokens/s": tokens / median, "samples/s": shape.batch / median}
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        row["peak GB"] = peak / 1e9
        # a graph's activations lie in its own pool, which is alive before
        row["activations GB"] = float("nan") if {"graph", "reduce"} & set(options) else (peak - before) / 1e9
        best = next((v for k, v in PEAK.items() if k in torch.cuda.get_device_name()), None)
        row["share of peak"] = flops(net, shape) / median / best if best else float("nan")
    row |= {"launches a block": counted, "warm-up s": first}
    return row


def longest(name: str, device: str, headdim: int, most: int = 2**24) -> int:
    """The longest single sequence (d256 depth 8) of which a training step fits: powers of two, then their halves."""

    def fits(length: int) -> bool:
        shape = Shape(1, length, 256, 8)
        try:
            net = build(name, shape, headdim).to(device)
            step = Step(net, partial(loss_of, net, *shape.batch_of(device)))
            step()
            torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            net = step = None
            torch.cuda.empty_cache()
        return True

    length = 2**17
    while length < most and fits(2 * length):
        length *= 2
    return length * 3 // 2 if length < most and fits(length * 3 // 2) else length


COLUMNS = ["shape", "b", "l", "d", "depth", "model", "parameters", "ms", "tokens/s", "samples/s", "peak GB"]
COLUMNS += ["activations GB", "share of peak", "launches a block", "warm-up s", "note"]


def table(rows: list[dict]) -> str:
    columns = [c for c in COLUMNS if any(c in row for row in rows)]
    lines = [" | ".join(columns)]
    for row in rows:
        values = [row.get(c, "") for c in columns]
        lines.append(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    return "\n".join(lines)


def write(rows: list[dict], name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    with open(FOLDER / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: list[dict], name: str) -> None:
    """Tokens a second and, where they were measured, activations by shape, a bar a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "tokens/s" in row]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    measured = any(math.isfinite(row.get("activations GB", math.nan)) for row in rows)
    columns = ["tokens/s", "activations GB"][: 1 + measured]
    figure, axes = plt.subplots(
        len(columns), 1, figsize=(9, 3.5 * len(columns)), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, column in zip(axes[:, 0], columns, strict=True):
        for k, model in enumerate(models):
            values = {row["shape"]: row.get(column, float("nan")) for row in rows if row["model"] == model}
            at = [shapes.index(s) + (k - (len(models) - 1) / 2) * 0.8 / len(models) for s in values]
            axis.bar(at, list(values.values()), width=0.8 / len(models), label=model)
        axis.set_ylabel(column)
        axis.set_yscale("log")
    axes[-1, 0].set_xticks(range(len(shapes)), shapes)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        title="training step, bf16 autocast; log scales",
        fontsize=7,
        title_fontsize=9,
        ncol=len(models),
        loc="outside upper center",
    )
    figure.savefig(FOLDER / f"{name}.png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=15, help="timed steps, after three")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test on a CPU")
    parser.add_argument("--longest", action="store_true", help="instead: the longest sequence that fits")
    parser.add_argument("--memory", type=float, help="GB of the GPU's memory that may be used: 80 as of a smaller card")
    parser.add_argument("--name", default="train", help="of the result files")
    a = parser.parse_args()
    cuda = a.device.startswith("cuda")
    headdim = 16 if a.tiny else 64
    if a.memory and cuda:
        part = 1e9 * a.memory / torch.cuda.get_device_properties(a.device).total_memory
        number = torch.device(a.device).index or 0  # "cuda" has none, which this function wants
        torch.cuda.set_per_process_memory_fraction(min(part, 1.0), number)
    models = [m for m in a.models if cuda or not m.endswith(("+graph", "+compile", "+reduce"))]
    if any(m.startswith("flip") for m in models) and (not cuda or peer_scan() is None):
        print("flip skipped: it needs a GPU and mamba-ssm")
        models = [m for m in models if not m.startswith("flip")]
    if a.longest:
        for name in models:
            print(f"{name}: {longest(name, a.device, headdim)} tokens", flush=True)
        return
    rows: list[dict] = []
    for name in models:  # model by model: the peer tunes itself once
        for label in a.shapes:
            shape = (TINY if a.tiny else SHAPES).get(label)
            if shape is None:
                continue
            try:
                rows.append(measure(name, label, shape, a.device, a.steps, headdim))
            except torch.cuda.OutOfMemoryError:
                rows.append({"shape": label, "model": name, "note": "out of memory"})
            torch._dynamo.reset()
            if cuda:
                torch.cuda.empty_cache()
            print(rows[-1], flush=True)
            write(rows, a.name)
    order = list(SHAPES)
    rows.sort(key=lambda row: order.index(row["shape"]))
    write(rows, a.name)
    plot(rows, a.name)
    print(f"\n{hardware(a.device)}; steps of bf16 autocast, {a.steps} timed\n{table(rows)}")


if __name__ == "__main__":
    main()
