"""What vision and sequence DataModules share: splits, labels, loaders, and the checkpoint's say in all of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from bimamba.data import preflight
from bimamba.data.collate import Batch, collate
from bimamba.data.fingerprint import content_of, fingerprint
from bimamba.data.images import LazyImages, cores
from bimamba.data.labels import LabelMap
from bimamba.data.loader import TrainLoader
from bimamba.data.records import SPLITS, Records, Source
from bimamba.data.samplers import Draw, EvalBatches, TrainBatches
from bimamba.data.sequences import TokenRows
from bimamba.data.splits import check_fractions, check_parts, make_splits, strata_of
from bimamba.spec import DataSpec


@dataclass
class Examples:
    """Rows ready to be batched: inputs as a store, labels as numbers.

    Args:
        inputs: has `batch(rows, …)`, see `images.py` and `sequences.py`.
        labels: int64 `(n,)`, float32 `(n, k)`, or None where unknown.
        ids: names of the rows.
    """

    inputs: Any
    labels: torch.Tensor | None
    ids: pa.Array

    def __len__(self) -> int:
        return len(self.ids)


class RowDataset(Dataset):
    """Some rows of `Examples`. Indexed by a whole batch at once (`Draw`, or a list of positions)."""

    def __init__(
        self,
        examples: Examples,
        rows: np.ndarray,
        training: bool = False,
        pad_to_multiple: int = 1,
        pack_length: int | None = None,
    ) -> None:
        self.examples, self.rows, self.training = examples, rows, training
        self.pad_to_multiple, self.pack_length = pad_to_multiple, pack_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw | Sequence[int] | int) -> Batch:
        """The batch of the given positions."""
        epoch, positions = draw if isinstance(draw, Draw) else (0, np.atleast_1d(np.asarray(draw)))
        rows = self.rows[positions]
        index = torch.from_numpy(rows)
        examples = self.examples
        label = None if examples.labels is None else examples.labels[index]
        ids = examples.ids.take(pa.array(rows)).to_pylist()
        if self.pack_length is not None:
            inputs, mask, packing = examples.inputs.packed(index, self.pack_length, self.pad_to_multiple)
            return collate(inputs, ids, label, mask, packing)
        if isinstance(examples.inputs, TokenRows):
            inputs, mask = examples.inputs.batch(index, self.pad_to_multiple)
            return collate(inputs, ids, label, mask)
        return collate(examples.inputs.batch(index, epoch if self.training else None), ids, label)

    # What a plain DataLoader(batch_size=…) calls with the positions of a batch.
    __getitems__ = __getitem__


class ClassificationDataModule(LightningDataModule):
    """Base of `VisionDataModule` and `SequenceDataModule`; see configs/data for what each option means.

    Raises:
        ValueError: (from the constructor) an option no data set could satisfy.
    """

    def __init__(
        self,
        source: Source,
        *,
        path: str | None = None,
        task: str | None = None,
        predict: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int | str = "auto",
        pin_memory: bool | None = None,
        persistent_workers: bool = True,
        prefetch_factor: int | None = None,
        drop_last: bool = False,
        sampling: str = "shuffled",
        seed: int | None = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        num_folds: int | None = None,
        fold: int | None = None,
        fold_role: str = "val",
        problem: str | None = None,
        class_names: Sequence[str] | None = None,
        check_duplicates: bool = True,
    ) -> None:
        super().__init__()
        check_fractions(val_fraction, test_fraction, num_folds, fold, fold_role)
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size is not None and size < 1:
                raise ValueError(f"data.{name}: expected at least 1, got {size}")
        if num_workers != "auto" and (not isinstance(num_workers, int) or num_workers < 0):
            raise ValueError(f"data.num_workers: expected a number or 'auto', got {num_workers!r}")
        if sampling not in ("shuffled", "balanced"):
            raise ValueError(f"data.sampling: expected shuffled or balanced, got {sampling!r}")
        self.sampling = sampling
        self.source, self.path, self.task, self.predict = source, path, task, predict
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.persistent_workers, self.prefetch_factor, self.drop_last = persistent_workers, prefetch_factor, drop_last
        # Without a seed the splits still are those of seed 0: a split that nobody can repeat would put training rows
        # into the test set of a later evaluation.
        self.seed = 0 if seed is None else seed
        self.val_fraction, self.test_fraction, self.num_folds, self.fold = val_fraction, test_fraction, num_folds, fold
        self.fold_role = fold_role
        self.problem, self.class_names = problem, tuple(map(str, class_names)) if class_names is not None else None
        self.check_duplicates = check_duplicates

        self.expected: DataSpec | None = None
        self.examples: Examples | None = None
        self.splits: dict[str, np.ndarray] = {}
        self.fingerprint: dict[str, Any] = {}  # of the training rows; see `fingerprint.py`
        self.notes: list[str] = []
        self._spec: DataSpec | None = None
        self._predicted: Examples | None = None

    # What the two kinds differ in

    @abstractmethod
    def _store(self, records: Records) -> Any:
        """The inputs of all rows, ready to be batched; brings them to the expected spec where there is one."""

    @abstractmethod
    def _make_spec(self, store: Any, names: LabelMap, train: np.ndarray) -> DataSpec:
        """The spec of the training data."""

    @abstractmethod
    def _lengths(self, rows: np.ndarray) -> np.ndarray | None:
        """Lengths to bucket by, or None."""

    @abstractmethod
    def transform(self, batch: Batch, training: bool) -> Batch:
        """Augments (in training) and normalises a batch, on its device. Changes the dict it is given."""

    # The contract with train.py

    @property
    def spec(self) -> DataSpec:
        """The spec: of the checkpoint if one was given, else of the data.

        Raises:
            RuntimeError: called before `setup`.
        """
        if self._spec is None:
            raise RuntimeError("DataModule.spec is there after setup()")
        return self._spec

    def expect(self, spec: DataSpec) -> None:
        """Takes statistics, alphabet, length and class names from a checkpoint. Call before `setup`."""
        if self.examples is not None:
            raise RuntimeError("expect() comes before setup()")
        self.expected = self._spec = spec

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each split."""
        return {name: len(self.splits.get(name, ())) for name in SPLITS}

    @property
    def class_counts(self) -> torch.Tensor:
        """Training rows of each class, int64 `(k,)` (for multilabel: rows that carry the label)."""
        return preflight.class_counts(self, "train")

    def preflight(self) -> dict[str, Any]:
        """Prints (on rank zero) and returns what the data look like; plain numbers, strings, lists and dicts.

        Raises:
            ValueError: training on these data cannot work.
        """
        return preflight.report(self)

    # Lightning's hooks

    def prepare_data(self) -> None:
        """Downloads, once a node."""
        self.source.prepare(self.path, self.task)

    def setup(self, stage: str | None = None) -> None:
        """Reads the data of a stage: fit, validate and test share one reading; predict reads `data.predict`.

        Raises:
            ValueError: the data cannot be read, do not fit the options, or are not what the checkpoint was trained on.
        """
        stage = getattr(stage, "value", stage)
        if stage == "predict":
            if self._predicted is None:
                self._setup_predict()
        elif self.examples is None:
            self._setup_labelled(stage)

    def _setup_labelled(self, stage: str | None) -> None:
        records = self.source.load(self.path, self.task)
        self._rename_classes(records)
        evaluating = stage in ("validate", "test") and self.expected is not None
        names = self._label_map(records, evaluating)
        labels = names.encode(records)
        splits, notes = make_splits(
            records.splits,
            strata_of(labels.numpy(), names.problem),
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            num_folds=self.num_folds,
            fold=self.fold,
            fold_role=self.fold_role,
            seed=self.seed,
            groups=records.groups,
        )
        if not evaluating and len(splits["train"]) == 0:
            raise ValueError(f"no training rows: expected a training set, got {_sizes(splits)}")
        ids = pa.array(records.ids, pa.large_string())
        chosen = "\n".join(ids.take(pa.array(splits["train"])).to_pylist())
        self.fingerprint = fingerprint(splits["train"], chosen.encode(), partial(content_of, records.inputs))
        store = self._store(records)
        if self.expected is None:
            self._spec = self._make_spec(store, names, splits["train"])
        self.examples = Examples(store, labels, ids)
        self.splits, self.notes = splits, records.notes + notes
        if not evaluating:
            preflight.check_classes(self, records.describe)
            check_parts(records.splits, splits, self.val_fraction, self.test_fraction)

    def _rename_classes(self, records: Records) -> None:
        """Other names in `data.class_names` take the place of those that the source knows, one by one.

        The source's own names in another order rename nothing: they set the order of the outputs, and
        `LabelMap.encode` finds each label by its name.
        """
        names, known = self.class_names, records.label_names
        if names is None or known is None or set(names) == set(known):
            return
        if len(names) != len(known):
            raise ValueError(
                f"data.class_names: expected {len(known)} names, as the data have ({', '.join(known)}), "
                f"got {len(names)}"
            )
        moved = [new for new, old in zip(names, known, strict=True) if new != old and new in known]
        if moved:
            raise ValueError(
                f"data.class_names: expected the data's names in any order ({', '.join(known)}), or new ones in this "
                f"order, got {', '.join(names)}: {moved[0]!r} is a name of the data in another place beside new ones"
            )
        records.label_names = names

    def _label_map(self, records: Records, evaluating: bool) -> LabelMap:
        """Meaning of the labels; the checkpoint's where there is one, after a comparison with the data's."""
        expected = self.expected
        if expected is None:
            return LabelMap.of(records, self.problem, self.class_names)
        if self.problem is not None and self.problem != expected.problem:
            raise ValueError(f"data.problem: the checkpoint expects {expected.problem!r}, got {self.problem!r}")
        known = LabelMap(expected.problem, expected.class_names)
        if records.labels is None:
            raise ValueError("the data set has no labelled rows")
        if expected.problem in ("multilabel", "regression"):
            found = self.class_names or records.label_names
        elif evaluating and records.label_names is None and self.class_names is None:
            # Rows to evaluate need not hold every class; a class the checkpoint does not know stops in encode().
            return known
        else:
            found = LabelMap.of(records, expected.problem, self.class_names).class_names
        if found is not None and tuple(found) != expected.class_names:
            raise ValueError(
                f"class names differ: the checkpoint was trained on {list(expected.class_names)}, "
                f"the data have {list(found)}"
            )
        return known

    def _setup_predict(self) -> None:
        if self.predict is None:
            raise ValueError("data.predict is not set: expected a file or folder to predict")
        if self._spec is None:  # neither a checkpoint nor an earlier setup: learn the spec from the training data
            self._setup_labelled("fit")
        records = self.source.read(self.predict)
        if len(records) == 0:
            raise ValueError(f"data.predict: expected at least one row, found none in {self.predict}")
        for note in records.notes:
            preflight.warn(f"{self.predict}: {note}")
        labels = None
        if records.labels is not None:
            try:
                labels = LabelMap(self.spec.problem, self.spec.class_names).encode(records)
            except ValueError as error:
                # A table to predict may carry anything in its label column; say so and predict all the same.
                preflight.warn(f"labels of {self.predict} are left out: {error}")
        self._predicted = Examples(self._store(records), labels, pa.array(records.ids, pa.large_string()))

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        dataset = self._dataset("train", training=True)
        if self._overfitting():
            return self._loader(dataset, SequentialSampler(dataset), batch_size=self.batch_size)
        return self._loader(
            dataset,
            TrainBatches(
                len(dataset),
                self.batch_size,
                seed=self.seed,
                lengths=self._lengths(dataset.rows),
                drop_last=self.drop_last,
                weights=self._row_weights(),
                **self._process(),
            ),
            begin=self._batches_done,
        )

    def _row_weights(self) -> np.ndarray | None:
        """With balanced sampling, one over the size of each training row's class: all classes are drawn alike."""
        if self.sampling == "shuffled":
            return None
        if self.spec.problem not in ("multiclass", "binary"):
            raise ValueError(
                f"data.sampling=balanced: expected rows of one class each, the problem is {self.spec.problem}"
            )
        assert self.examples is not None and self.examples.labels is not None
        return 1 / self.class_counts.numpy()[self.examples.labels.numpy()[self.splits["train"]]]

    def val_dataloader(self) -> DataLoader | list:
        """Every row once; an empty list where there is no validation set."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader | list:
        """Every row once; an empty list where there is no test set."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Every row of `data.predict` once, in order."""
        if self._predicted is None:
            raise RuntimeError("call setup('predict') first")
        dataset = RowDataset(self._predicted, np.arange(len(self._predicted)), **self._dataset_options())
        size = self.eval_batch_size or self.batch_size
        return self._loader(dataset, EvalBatches(len(dataset), size, **self._process()))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """All but the ids: Lightning's walk through a thousand strings takes longer than the copies."""
        ids = {"id": batch["id"]} if "id" in batch else {}
        tensors = {name: value for name, value in batch.items() if name != "id"}
        return super().transfer_batch_to_device(tensors, device, dataloader_idx) | ids

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augmentation and normalisation on the device."""
        batch = self.transform(batch, training=self.trainer is not None and self.trainer.training)
        if self.trainer is not None:  # bf16-true, 64-true: before the transfer images are uint8
            batch["inputs"] = self.trainer.precision_plugin.convert_input(batch["inputs"])
        return batch

    # Loaders

    def _dataset_options(self) -> dict[str, Any]:
        return {}

    def _dataset(self, split: str, training: bool = False) -> RowDataset:
        if self.examples is None:
            raise RuntimeError("call setup('fit') or setup('test') first")
        return RowDataset(self.examples, self.splits[split], training, **self._dataset_options())

    def _eval_loader(self, split: str) -> DataLoader | list:
        dataset = self._dataset(split)
        if len(dataset) == 0:
            return []
        if self._overfitting():
            return self._loader(dataset, SequentialSampler(dataset), batch_size=self.batch_size)
        size = self.eval_batch_size or self.batch_size
        return self._loader(
            dataset, EvalBatches(len(dataset), size, lengths=self._lengths(dataset.rows), **self._process())
        )

    def _overfitting(self) -> bool:
        """With overfit_batches Lightning puts a sequential sampler into every loader: that needs ordinary batching."""
        if self.trainer is None:
            return False
        return self.trainer.state.fn == TrainerFn.FITTING and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]  # set by Lightning

    def _process(self) -> dict[str, Any]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _batches_done(self) -> int:
        """Batches of this epoch that a resumed training has behind it."""
        if self.trainer is None or not self.trainer.training:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _loader(
        self,
        dataset: RowDataset,
        sampler: Any,
        batch_size: int | None = None,
        begin: Callable[[], int] | None = None,
    ) -> DataLoader:
        workers = self._workers(dataset)
        make: Any = DataLoader if begin is None else partial(TrainLoader, begin=begin)
        return make(
            dataset=dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=self._pins(dataset) if self.pin_memory is None else self.pin_memory,
            persistent_workers=self.persistent_workers and workers > 0,
            prefetch_factor=self.prefetch_factor if workers > 0 else None,
            # Nothing in the workers draws from it (crops at decoding time are seeded by epoch and row).
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _pins(self, dataset: RowDataset) -> bool:
        """Whether batches are pinned where `pin_memory` does not say it."""
        return torch.cuda.is_available()

    def _workers(self, dataset: RowDataset) -> int:
        if self.num_workers != "auto":
            return int(self.num_workers)
        if not isinstance(
            dataset.examples.inputs, LazyImages
        ):  # in memory: a batch is one gather, a worker only copies it
            return 0
        local = self.trainer.num_devices if self.trainer is not None else 1
        return max(1, min(16, cores() // local))


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _sizes(splits: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())
