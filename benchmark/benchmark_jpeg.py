"""What a re-encoding of CIFAR-10 costs: a network whose accuracy on the original is published, trained on the copy.

    python benchmark/benchmark_jpeg.py --path ../shared/data/cifar10 --seeds 0 1        # a GPU; some minutes

ResNet-20 as of He et al. 2016 (arXiv:1512.03385, section 4.2): 0.27M parameters, all 50,000 training images, 64,000
steps of 128 images by SGD (momentum 0.9, decay 1e-4, rate 0.1, a tenth of it from steps 32,000 and 48,000 on), crops
of images padded by 4, flips. Published: 91.25 % of the test images. The test set is read once, behind the last step.
A step is one CUDA graph; products are TF32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba.data import VisionDataModule
from bimamba.data.augment import normalise, random_crop, random_flip
from bimamba.data.sources import ImageTable

STEPS, BATCH, RATE, MOMENTUM, DECAY = 64_000, 128, 0.1, 0.9, 1e-4
PUBLISHED = 91.25


class Unit(nn.Module):
    """Two 3 x 3 convolutions and what comes in; where that has another size, every other pixel of it and zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return (x + y).relu()


def resnet(units: int = 3) -> nn.Module:
    """6 `units` + 2 layers: three stages of 16, 32 and 64 channels."""
    sizes = [16] * (units + 1) + [32] * units + [64] * units
    body = [Unit(a, b) for a, b in pairwise(sizes)]
    first = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    net = nn.Sequential(*first, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return net


def images(path: str, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Normalised images and labels of both splits."""
    source = ImageTable(path, image_column="img", label_column="label")
    data = VisionDataModule(source, cache=True, num_workers=0, val_fraction=0.02)
    data.setup("fit")
    every = data.examples
    test = torch.as_tensor(data.splits["test"])
    known = torch.ones(len(every.inputs), dtype=torch.bool).index_fill_(0, test, False).nonzero()[:, 0]
    mean, std = (torch.tensor(values, device=device) for values in (data.spec.mean, data.spec.std))
    return {
        name: (normalise(every.inputs.pixels[rows].to(device), mean, std), every.labels[rows].to(device))
        for name, rows in (("train", known), ("test", test))
    }


def train(known: tuple[Tensor, Tensor], steps: int, device: str) -> nn.Module:
    net = resnet().to(device, memory_format=torch.channels_last)
    weights = list(net.parameters())
    moved = [torch.zeros_like(w) for w in weights]
    rate = torch.tensor(RATE, device=device)
    rows = torch.zeros(BATCH, dtype=torch.int64, device=device)

    def step() -> None:
        x = random_flip(random_crop(known[0][rows], 4), 0.5, dim=3)
        loss = F.cross_entropy(net(x.contiguous(memory_format=torch.channels_last)), known[1][rows])
        with torch.no_grad():
            gradients = torch._foreach_add(torch.autograd.grad(loss, weights), weights, alpha=DECAY)
            torch._foreach_mul_(moved, MOMENTUM)
            torch._foreach_add_(moved, gradients)
            torch._foreach_sub_(weights, torch._foreach_mul(moved, rate))

    run = step
    if device.startswith("cuda"):
        before = {k: v.clone() for k, v in net.state_dict().items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as capturing wants it: warmed up on another stream
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        net.load_state_dict(before)
        torch._foreach_zero_(moved)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    order = torch.zeros(0, dtype=torch.int64, device=device)
    for i in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(known[0]), device=device)
        rows.copy_(order[:BATCH])
        order = order[BATCH:]
        if i in (steps // 2, steps * 3 // 4):
            rate *= 0.1
        run()
    return net


@torch.no_grad()
def accuracy(net: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    net.eval()
    right = sum((net(x).argmax(1) == y).sum() for x, y in zip(*(t.split(1000) for t in test), strict=True))
    return 100 * int(right) / len(test[0])


def main(given: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=str(Path(__file__).parents[2] / "shared" / "data" / "cifar10"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer: does it run; the rates fall at half and 3/4")
    a = parser.parse_args(given)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = True, True
    splits = images(a.path, a.device)
    found = []
    for seed in a.seeds:
        torch.manual_seed(seed)
        start = time.perf_counter()
        found.append(accuracy(train(splits["train"], a.steps, a.device), splits["test"]))
        print(f"seed {seed}: test accuracy {found[-1]:.2f} % ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"mean {statistics.mean(found):.2f} %; published on the original {PUBLISHED} %")
    return found


if __name__ == "__main__":
    main()
