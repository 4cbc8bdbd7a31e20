"""`torch.export` of a classifier: a program that runs without this package, for any batch size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, export

from bimamba.hub import HubModel
from bimamba.spec import DataSpec

BATCHES = (1, 5)  # sizes that the program is checked at; neither is the one it was traced with
TOLERANCE = 1e-5  # of float32 outputs, relative to the largest; what was measured is 0 to 4e-7


def export_program(model: HubModel, path: Path) -> None:
    """Write a classifier as `torch.export` program, through the PyTorch path (no kernels), the batch size dynamic.

    Inputs are those of the classifier: images `(b, c, height, width)`; or token ids `(b, spec.max_length)` and the mask
    `(b, spec.max_length)`, so that a shorter sequence is padded with 0. Load it by `torch.export.load(path).module()`.

    Args:
        model: a `Classifier` in float32 on the CPU; left as it was.
        path: of the file, `….pt2`.

    Raises:
        ValueError: the program's outputs differ from the model's at some batch size; nothing is written then.
    """
    training = model.training
    model.eval()
    whole = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        with torch.no_grad(), pytorch_path():
            inputs = example(model.spec, 3)
            batch = Dim("batch", min=1)
            program = export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False)
            check(model, program)
            torch.export.save(program, whole)
            check(model, torch.export.load(whole))
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)
        model.train(training)


def check(model: HubModel, program: ExportedProgram) -> None:
    """Compares a program with its model at two batch sizes.

    Raises:
        ValueError: they differ.
    """
    runs = program.module()
    for size in BATCHES:
        inputs = example(model.spec, size)
        expected, got = model(*inputs), runs(*inputs)
        error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if got.shape != expected.shape or not error <= TOLERANCE:
            raise ValueError(
                f"torch.export: the program's outputs differ from the model's by {error:.1e} at batch size {size} "
                f"(at most {TOLERANCE:.0e} is expected); it was not written"
            )


def example(spec: DataSpec, size: int) -> tuple[Tensor, ...]:
    """Inputs of a model: normalised noise, or random letters, rows of different lengths."""
    generator = torch.Generator().manual_seed(size)
    if spec.kind == "image":
        return (torch.randn(size, *spec.image_shape, generator=generator),)
    lengths = torch.randint(1, spec.longest + 1, (size, 1), generator=generator)
    mask = torch.arange(spec.longest) < lengths
    tokens = torch.randint(1, spec.num_tokens, (size, spec.longest), generator=generator)
    return tokens * mask, mask


@contextmanager
def pytorch_path() -> Iterator[None]:
    """The scan's PyTorch backend, whatever the environment asks for."""
    before = os.environ.get("BIMAMBA_BACKEND")
    os.environ["BIMAMBA_BACKEND"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["BIMAMBA_BACKEND"]
        else:
            os.environ["BIMAMBA_BACKEND"] = before
