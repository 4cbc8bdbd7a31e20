"""Windows of a genome for masked-token pretraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from bimamba.data.collate import Batch
from bimamba.data.datamodule import ClassificationDataModule
from bimamba.data.fasta_index import IndexedFasta
from bimamba.data.fingerprint import fingerprint
from bimamba.data.images import cores
from bimamba.data.records import SPLITS, Records, required_path
from bimamba.data.sequences import check_alphabet
from bimamba.data.windows import MaskedWindows, Masking, Windows
from bimamba.spec import DataSpec
from bimamba.strands import DNA

BLOCK = 64  # windows that stay in one split: neighbours resemble each other (repeats, composition)
FEW = 10_000  # windows, below which loader processes cost more than they save
SAMPLED = 1000  # windows that the preflight looks at


class _Genome:
    """The source of the base class: a genome is indexed once a node, and has no labelled rows."""

    def prepare(self, path: str | None, task: str | None) -> None:
        IndexedFasta(required_path(path, "a FASTA file, e.g. a genome"))

    def load(self, path: str | None, task: str | None) -> Records:
        raise ValueError("a genome has no labelled rows: its windows are for experiment=dna_pretrain")

    def read(self, path: str) -> Records:
        raise ValueError("stage=predict: this model predicts hidden letters; fine-tune it first (model.pretrained=)")


class GenomeDataModule(ClassificationDataModule):
    """Windows of a FASTA file of any size, letters hidden: for `bimamba.tasks.MaskedTokenTask`.

    A batch has `inputs` (tokens to be read), `mask`, `label` int64 `(b, l)` (-100 where nothing is to be predicted) and
    `id`. Strands, masks and their order depend on seed, epoch and window alone.

    Args:
        path: the FASTA file, not compressed; its index is made where it is missing (`fasta_index`).
        window: letters of a window. min_length: of a record's last, shorter window; shorter ones are left out.
        alphabet: of the tokens; the last letter, N, is also what hidden letters become.
        masking: see `Masking`.
        val_records, test_records: names of the records (chromosomes) for validation and test; None: blocks of 64
            neighbouring windows are drawn for `val_fraction` and `test_fraction`.
        augment: in training, `reverse_complement`, the probability of reading a window on the other strand.
        batch_size, eval_batch_size, num_workers, pin_memory, persistent_workers, prefetch_factor, drop_last, seed: as
            of the other data modules.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        predict: str | None = None,
        window: int = 1024,
        min_length: int = 64,
        alphabet: str = DNA,
        masking: Mapping[str, float] | None = None,
        val_records: Sequence[str] | None = None,
        test_records: Sequence[str] | None = None,
        augment: Mapping[str, float] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int | str = "auto",
        pin_memory: bool | None = None,
        persistent_workers: bool = True,
        prefetch_factor: int | None = None,
        drop_last: bool = False,
        seed: int | None = 0,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
    ) -> None:
        super().__init__(
            _Genome(),
            path=path,
            predict=predict,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            prefetch_factor=prefetch_factor,
            drop_last=drop_last,
            seed=seed,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
        )
        check_alphabet(alphabet)
        if not 1 <= min_length <= window:
            raise ValueError(f"data.min_length: expected 1 to data.window={window}, got {min_length}")
        self.turned = dict(augment or {}).get("reverse_complement", 0.0)
        if not 0 <= self.turned <= 1:
            raise ValueError(f"data.augment.reverse_complement: expected a probability in [0, 1], got {self.turned}")
        self.window, self.min_length, self.alphabet = window, min_length, alphabet
        self.masking = Masking(**(masking or {}))
        self.val_records, self.test_records = list(val_records or ()), list(test_records or ())
        self.windows: Windows | None = None

    def setup(self, stage: str | None = None) -> None:
        """Opens the file and draws the splits."""
        if getattr(stage, "value", stage) == "predict":
            self.source.read("")
        if self.windows is not None:
            return
        expected = self.expected
        names = tuple(self.alphabet[:-1])
        if expected is not None and (expected.alphabet, expected.class_names) != (self.alphabet, names):
            raise ValueError(
                f"the checkpoint predicts {list(expected.class_names)} of alphabet {expected.alphabet}, not "
                f"{list(names)} of {self.alphabet}"
            )
        fasta = IndexedFasta(required_path(self.path, "a FASTA file, e.g. a genome"))
        windows = Windows(fasta, self.window, self.min_length, self.alphabet)
        if len(windows) == 0:
            raise ValueError(f"{fasta.path}: no record has data.min_length={self.min_length} letters")
        self.splits = self._split(windows)
        if len(self.splits["train"]) == 0:
            raise ValueError(f"{fasta.path}: {len(windows)} windows leave none to train on; lower data.window")
        rows, records = self.splits["train"], [(r.name, r.length) for r in fasta.records]
        cut = repr((records, self.window, self.min_length)).encode()
        self.fingerprint = fingerprint(
            rows, cut + rows.tobytes(), lambda row: fasta.read(*windows.place(row)).tobytes()
        )
        if expected is None:
            self._spec = DataSpec("sequence", "multiclass", names, alphabet=self.alphabet, max_length=self.window)
        self.windows = windows

    def _split(self, windows: Windows) -> dict[str, np.ndarray]:
        everything = np.arange(len(windows))
        if self.val_records or self.test_records:
            names = [r.name for r in windows.fasta.records]
            chosen = {"val": self.val_records, "test": self.test_records}
            for split, wanted in chosen.items():
                missing = sorted(set(wanted) - set(names))
                if missing:
                    raise ValueError(
                        f"data.{split}_records: {windows.fasta.path} has no {', '.join(missing)}; it has "
                        f"{', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
                    )
            if set(self.val_records) & set(self.test_records):
                raise ValueError("data.val_records and data.test_records have records in common")
            of = np.array(names, dtype=object)[windows.records()]
            splits = {split: everything[np.isin(of, wanted)] for split, wanted in chosen.items()}
            return {"train": everything[~np.isin(of, self.val_records + self.test_records)], **splits}
        # Where there are few windows, smaller blocks: each split gets some.
        size = max(1, min(BLOCK, len(windows) // 50))
        blocks = np.random.default_rng(self.seed).permutation(-(-len(windows) // size))
        val, test = (max(round(f * len(blocks)), int(f > 0)) for f in (self.val_fraction, self.test_fraction))
        of = everything // size
        parts = {"val": blocks[:val], "test": blocks[val : val + test], "train": blocks[val + test :]}
        return {split: everything[np.isin(of, parts[split])] for split in SPLITS}

    def transform(self, batch: Batch, training: bool) -> Batch:
        """Nothing is left to do: strands and masks were drawn with the windows."""
        return batch

    def preflight(self) -> dict[str, Any]:
        """Prints (on rank zero) and returns records, windows of each split, and the composition of a sample.

        `loss_of_frequencies` is the loss, in nats, of a model that knows how often each letter is and no more.

        Raises:
            ValueError: a character that is no letter, or unknown letters alone.
        """
        assert self.windows is not None, "preflight() comes after setup()"
        windows = self.windows
        sample = np.unique(np.linspace(0, len(windows) - 1, SAMPLED).astype(int))
        letters = np.concatenate([windows.tokens(int(i)) for i in sample])
        counts = np.bincount(letters, minlength=len(self.alphabet) + 1)[1:]
        known = counts[:-1] / max(counts[:-1].sum(), 1)
        if not counts[:-1].any():
            raise ValueError(f"{windows.fasta.path}: expected some of the letters {self.alphabet[:-1]}, found none")
        report = {
            "kind": "genome",
            "file": str(windows.fasta.path),
            "records": len(windows.fasta.records),
            "letters": sum(r.length for r in windows.fasta.records),
            "sizes": self.sizes,
            "window": self.window,
            "frequencies": {letter: float(f) for letter, f in zip(self.alphabet, known, strict=False)},
            "unknown": float(counts[-1] / counts.sum()),
            "loss_of_frequencies": float(-(known[known > 0] * np.log(known[known > 0])).sum()),
        }
        _show(report)
        return report

    @property
    def class_counts(self) -> torch.Tensor:
        raise ValueError("class weights need labelled rows, which a genome has not")

    # What the base class asks for, to serve its loaders

    def _dataset(self, split: str, training: bool = False) -> Any:
        assert self.windows is not None, "setup() comes first"
        rows = self.splits[split]
        return MaskedWindows(self.windows, rows, training, self.masking, self.seed, self.turned)

    def _lengths(self, rows: np.ndarray) -> None:
        return None

    def _workers(self, dataset: Any) -> int:
        if self.num_workers != "auto":
            return int(self.num_workers)
        if len(dataset) < FEW:
            return 0
        local = self.trainer.num_devices if self.trainer is not None else 1
        return max(1, min(8, cores() // local))

    def _store(self, records: Records) -> Any:
        raise AssertionError("a genome has no records of rows")

    def _make_spec(self, store: Any, names: Any, train: np.ndarray) -> DataSpec:
        raise AssertionError("a genome has no labels")


@rank_zero_only
def _show(report: Mapping[str, Any]) -> None:
    console = Console(stderr=True)
    table = Table(title=f"data: {report['file']}", title_justify="left")
    for column in ("", *report["sizes"]):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(f"windows of {report['window']}", *map(str, report["sizes"].values()))
    console.print(table)
    shares = ", ".join(f"{letter} {share:.1%}" for letter, share in report["frequencies"].items())
    console.print(
        f"{report['records']} records, {report['letters']:,} letters: {shares}; unknown {report['unknown']:.2%}"
    )
    console.print(f"loss of a model that knows these frequencies alone: {report['loss_of_frequencies']:.4f} nats")
