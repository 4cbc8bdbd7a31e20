"""Samples per second of the data path alone: loader, transfer and augmentation, without a model.

    python benchmark/benchmark_data.py                                      # CIFAR-10 at ../shared/data/cifar10
    python benchmark/benchmark_data.py --device cuda --workers 0 4 16 --batch 512

One line a way to hold the images (`data.cache`), number of workers and augmentation. A training reads no faster than
this: compare with `performance/samples_per_second` of a run, or with benchmark_train.py.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice

import torch

from bimamba.data import VisionDataModule
from bimamba.data.sources import ImageTable

AUGMENT = {
    "none": {},
    "crop, flip": dict(crop_padding=4, horizontal_flip=0.5),
    "crop, flip, RandAugment, erasing": dict(
        crop_padding=4, horizontal_flip=0.5, rand_augment=[2, 9], random_erasing=0.25
    ),
}


def rate(data: VisionDataModule, device: torch.device, seconds: float) -> float:
    """Samples per second over whole epochs or parts of one, the first batches left out."""
    loader = data.train_dataloader()
    samples, start = 0, 0.0
    while True:
        for i, batch in enumerate(loader):
            batch = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            batch = data.transform(batch, training=True)
            if i < 2 and samples == 0:  # workers start, kornia builds its operations
                _wait(device)
                start = time.perf_counter()
                continue
            samples += len(batch["label"])
            if i % 8 == 0:
                _wait(device)
                if time.perf_counter() - start > seconds:
                    return samples / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", default="../shared/data/cifar10")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--caches", nargs="*", default=["true", "device", "false"], choices=["true", "device", "false"])
    parser.add_argument("--seconds", type=float, default=3.0, help="measured a line")
    args = parser.parse_args()
    device = torch.device(args.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; batches of {args.batch}; {args.path}")
    print(f"{'data.cache':12}{'workers':>8}{'setup':>9}  {'augmentation':34}{'samples/s':>12}{'ms a batch':>12}")
    for cache in args.caches:
        data = VisionDataModule(
            ImageTable(image_column="img", label_column="label"),
            path=args.path,
            cache={"true": True, "false": False}.get(cache, cache),
            batch_size=args.batch,
            check_duplicates=False,
        )
        start = time.perf_counter()
        data.setup("fit")
        setup = time.perf_counter() - start
        for workers in islice(args.workers, 1 if cache == "device" else None):
            data.num_workers = workers
            for name, options in AUGMENT.items():
                data.augmentation = type(data.augmentation)(**options)
                samples = rate(data, device, args.seconds)
                print(
                    f"{cache:12}{workers:8}{setup:7.1f} s  {name:34}{samples:12,.0f}{1e3 * args.batch / samples:12.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
