"""Compiles what the launchers launch, without a GPU: `python tests/ops/kernels/offline.py cuda:90 bfloat16 '{"b": 8}'`.

The launchers run on empty CPU tensors with `JITFunction.run` replaced: it takes the very arguments of each launch and
compiles the kernel for the target asked for. Prints kernel, registers, spills and shared memory, one line each. Runs
without TRITON_INTERPRET alone.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bimamba.ops.conv1d.kernels import conv_backward, conv_forward, form_of
from bimamba.ops.gated_norm.kernels import norm_backward, norm_forward
from bimamba.ops.prepare import prepare
from bimamba.ops.ssd.kernels import choose
from bimamba.ops.ssd.kernels.choose import Device, Problem, forced
from bimamba.ops.ssd.kernels.scan import Inputs, Saved, scan_backward, scan_forward
from bimamba.ops.totals import Total, totals

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.uint8: "u8"}
TARGETS = {f"cuda:{arch}": (arch, 32) for arch in (80, 86, 90, 100, 120)} | {"hip:gfx942": ("gfx942", 64)}
# What the rule is told of the device: processors, descriptors, bytes of shared memory a program
DEVICES = {"cuda:86": Device(84, False, 99 * 1024), "cuda:120": Device(84, False, 99 * 1024)}


def source_of(kernel: JITFunction, arguments: dict) -> tuple[ASTSource, dict]:
    signature, constants, attributes, options = {}, {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    options = {k: v for k, v in arguments.items() if k not in ("grid", "warmup")}
    return ASTSource(kernel, signature, constants, attributes), options


def resources(binary: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    return {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", text)}


def compile_all(target: str, dtype: torch.dtype, flags: dict, config: dict) -> list[dict]:
    arch, warp = TARGETS[target]
    gpu = GPUTarget(target.split(":")[0], arch, warp)
    seen = []

    def run(self, *args, grid, warmup, **kwargs):
        source, options = source_of(self, dict(kwargs))
        kernel = triton.compile(source, target=gpu, options=options)
        line = {"kernel": self.__name__, "shared": kernel.metadata.shared}
        if "cubin" in kernel.asm:
            line |= resources(kernel.asm["cubin"])
        else:
            line |= {
                k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", kernel.asm["amdgcn"])
            }
        seen.append(line)

    JITFunction.run = run
    if target in DEVICES:
        choose._device = lambda _: DEVICES[target]
    sizes = {"b": 2, "l": 300, "h": 4, "g": 1, "p": 64, "n": 64} | {k: v for k, v in flags.items() if k in "blhgpn"}
    form = {k: v for k, v in flags.items() if k in ("bidirectional", "untied", "shift")}
    problem = Problem(**sizes, dtype=dtype, device=torch.device("cpu"), dt_softplus=True, **form)
    b, l, h, g, p, n = (sizes[k] for k in "blhgpn")

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype)

    x, dt, B, A = new(b, l, h, p), new(b, l, h), new(b, l, g, n), new(h, dtype=torch.float32)
    seq = new(b, l, dtype=torch.int32) if flags.get("seq") else None
    z = x if flags.get("z") else None
    state = new(b, h, p, n, dtype=torch.float32) if flags.get("initial") else None
    inputs = Inputs(x, (dt, dt), (A, A), (B, B), (B, B), (A, A), A, z, seq, (state, state))
    with forced(**config):
        _, _, saved = scan_forward(problem, inputs, save=True, keep_ungated=True, final=state is not None)
        scan_backward(problem, inputs, Saved(*saved), x, None, (dt, dt))
        if flags.get("recompute"):
            scan_backward(problem, inputs, Saved(None, None, None), x, None, (dt, dt))
    if flags.get("block", True):
        block_operators(dtype)
    return seen


def block_operators(dtype: torch.dtype) -> None:
    """Convolution and gated norm as a block calls them: a slice of its projection in, x, B and C out."""
    b, l, d, n = 2, 300, 256, 64
    projected = torch.empty(b, l, 2 * d + 2 * n + 8, dtype=dtype)
    z, xBC, _ = projected.split([d, d + 2 * n, 8], dim=-1)
    weight, bias = torch.empty(7, d + 2 * n), torch.empty(d + 2 * n)
    flags = torch.empty(b, l, dtype=torch.uint8), torch.empty(b, l, dtype=torch.int32)
    form, parts = form_of(weight, bias, True, 3, *flags, [d, n, n]), [xBC.new_empty(b, l, size) for size in (d, n, n)]
    conv_forward(form, xBC, weight, bias, *flags, parts)
    conv_backward(form, parts, xBC, weight, bias, *flags, torch.empty_like(projected)[..., d : 2 * d + 2 * n])
    y, z, weight = parts[0].flatten(0, 1), z.flatten(0, 1), torch.empty(d)
    norm_forward(y, z, weight, 1e-5, True, d, torch.empty_like(y))
    _, parts, _ = norm_backward(y, y, z, weight, 1e-5, True, d, dz=torch.empty_like(y), again=True)
    A, _ = prepare(torch.empty(4), torch.empty(d, 1, 7))
    heads = Total(torch.empty(3, 2, 4), torch.empty(4), torch.empty(4), factor=A)
    totals(heads, Total(torch.empty(3, 8, d), torch.empty(d, 1, 7), bias, taps=7), Total(parts, weight))


if __name__ == "__main__":
    target, dtype, *rest = sys.argv[1:]
    flags, config = (json.loads(rest[k]) if len(rest) > k else {} for k in range(2))
    for line in compile_all(target, getattr(torch, dtype), flags, config):
        print(json.dumps(line))
