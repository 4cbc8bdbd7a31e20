"""Kernels on a GPU that is not the current one, and on several at once (`pytest -m gpu`, two GPUs): the bits of cuda:0.

A launch goes to the current device unless something sees to it, and would read another GPU's memory there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import problem, results

from bimamba.nn import BiMamba2
from bimamba.nn.block import Block
from bimamba.ops.conv1d import depthwise_conv1d
from bimamba.ops.gated_norm import rms_norm_gated

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason=f"expected at least 2 CUDA devices, found {GPUS}")]


def gradients(call, tensors: dict) -> dict:
    """Output and gradients of every input of `call`, on the CPU."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    y = call(**leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    found = {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}
    assert all(v.device == next(iter(tensors.values())).device for v in found.values())
    return {k: v.detach().cpu() for k, v in found.items()}


def drawn(device: str, dtype=torch.bfloat16, **shapes) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(*shape, generator=generator).to(device, dtype) for k, shape in shapes.items()}


def scan_on(run, device: str) -> dict:
    a = problem(b=2, l=300, h=8, p=64, g=2, n=64, dtype=torch.bfloat16, device=device, D="h", z=True, states=True)
    return {k: v.cpu() for k, v in results(run, a).items()}


def convolution_on(run, device: str) -> dict:
    return gradients(
        lambda x, weight, bias: depthwise_conv1d(x, weight, bias, "silu", False),
        drawn(device, x=(2, 300, 96), weight=(96, 7), bias=(96,)),
    )


def norm_on(run, device: str) -> dict:
    return gradients(
        lambda y, z, weight: rms_norm_gated(y, z, weight), drawn(device, y=(2, 300, 96), z=(2, 300, 96), weight=(96,))
    )


def block_on(run, device: str) -> dict:
    torch.manual_seed(0)
    block = Block(64, lambda d: BiMamba2(d, headdim=32, d_state=32), mlp="swiglu").to(device)

    def call(x):
        with torch.autocast("cuda", torch.bfloat16):
            return block(x)

    found = gradients(call, drawn(device, torch.float32, x=(2, 300, 64)))
    x = drawn(device, torch.float32, x=(2, 300, 64))["x"]
    call(x).square().mean().backward()
    return found | {name: p.grad.cpu() for name, p in block.named_parameters()}


CALLS = [scan_on, convolution_on, norm_on, block_on]


def same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.__name__)
def test_a_device_that_is_not_the_current_one(run, call):
    expected = call(run, "cuda:0")
    for index in range(1, GPUS):
        for _ in range(2):  # compiled, then launched from what is remembered
            same(call(run, f"cuda:{index}"), expected)
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        same(call(run, "cuda:0"), expected)


def test_devices_at_once_from_threads(run):
    """As one process with a thread a GPU, which autograd is already: it has a thread for each."""
    expected = scan_on(run, "cuda:0")
    with ThreadPoolExecutor(2 * GPUS) as pool:
        found = list(pool.map(lambda i: scan_on(run, f"cuda:{i % GPUS}"), range(8 * GPUS)))
    for one in found:
        same(one, expected)


def test_a_stream_of_another_device(run):
    expected = scan_on(run, "cuda:0")
    with torch.cuda.device(1), torch.cuda.stream(torch.cuda.Stream(1)):
        found = scan_on(run, "cuda:1")
    same(found, expected)
