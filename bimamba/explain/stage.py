"""`stage=explain`: from a trained network and some rows to pictures and the numbers behind them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from bimamba.explain import draw, logos
from bimamba.explain.matrix import mixing_matrix
from bimamba.explain.mutagenesis import importance, letter_heights, mean_by_name, mutate
from bimamba.explain.record import Scan, mixers, recording
from bimamba.explain.rows import SPLITS, Rows
from bimamba.explain.saliency import gradient_times_input
from bimamba.explain.statistics import collect
from bimamba.explain.target import Target, choose_target
from bimamba.figures import denormalise, save_figure
from bimamba.nn import ChannelMixer
from bimamba.predictions import decide
from bimamba.tasks import SupervisedTask, probabilities

log = logging.getLogger(__name__)


class Explanation:
    """What `configs/explain` describes; see there for every option.

    The network runs in evaluation mode, in float32 with exact products: differences of scores must not be rounding.

    Raises:
        ValueError: an option that no run could satisfy.
    """

    def __init__(
        self,
        split: str,
        samples: int,
        ids: Sequence[str] | None,
        target: str,
        layers: Sequence[int] | None,
        heads: Sequence[int] | None,
        batch_size: int | None,
        seed: int | None,
        statistics: Mapping[str, Any],
        matrices: Mapping[str, Any],
        saliency: Mapping[str, Any],
        mutagenesis: Mapping[str, Any],
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"explain.split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if ids is not None and not ids:
            raise ValueError("explain.ids: expected at least one id, or null; got an empty list")
        counts = {"samples": samples, "batch_size": batch_size, "statistics.samples": statistics["samples"]}
        counts |= {f"matrices.{k}": matrices[k] for k in ("samples", "max_length")}
        counts |= {f"mutagenesis.{k}": mutagenesis[k] for k in ("samples", "max_length")}
        for name, count in counts.items():
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ValueError(f"explain.{name}: expected a whole number from 1, got {count!r}")
        self.split, self.samples, self.ids, self.target = split, samples, ids, str(target)
        self.layers, self.heads, self.batch_size = layers, heads, batch_size
        self.seed = 0 if seed is None else seed
        self.statistics, self.matrices, self.saliency, self.mutagenesis = statistics, matrices, saliency, mutagenesis

    def __call__(
        self, task: Any, datamodule: Any, trainer: Trainer, output_dir: Path, plot_dir: Path
    ) -> dict[str, float]:
        """Explains; writes `<plot_dir>/*.png` and `<output_dir>/numbers/*`, and shows the pictures to W&B.

        Args:
            task: with its weights. datamodule: set up for the split. trainer: for its device and loggers.

        Returns:
            Numbers named `explain/…`.

        Raises:
            ValueError: another task, several devices, an unknown layer, head, row or class, or an input too long for
                what was asked.
        """
        if not isinstance(task, SupervisedTask):
            raise ValueError(
                f"stage=explain explains classifiers and regressors, got a {type(task).__name__}'s network"
            )
        if trainer.world_size > 1:
            raise ValueError(f"stage=explain runs in one process: expected trainer.devices=1, got {trainer.world_size}")
        self.trainer, self.folder, self.plot_dir = trainer, output_dir / "numbers", plot_dir
        self.folder.mkdir(parents=True, exist_ok=True)
        device = trainer.strategy.root_device
        self.spec, self.net = task.spec, task.net.to(device).float().eval()
        self.run = self.net.forward  # not the call, which may be compiled: recording watches Python functions
        self.rows = Rows(datamodule, self.split, device, self.batch_size)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.no_grad():
                return self._explain()
        finally:
            torch.set_float32_matmul_precision(precision)

    def _explain(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if any(isinstance(module, ChannelMixer) for module in self.net.modules()):
            log.info("explain: channel mixers scan a token's channels: no step sizes and mixing matrices of them")
        if mixers(self.net):
            names = self._layers()
            if self.matrices["enabled"]:  # first: this is what long inputs cannot have
                metrics |= self._matrices(names)
            if self.statistics["enabled"]:
                metrics |= self._statistics(names)
        elif self.matrices["enabled"] or self.statistics["enabled"]:
            log.info("explain: no step sizes and mixing matrices: this network's mixers have no scan (attention)")
        if self.spec.kind == "image" and self.saliency["enabled"]:
            self._saliency()
        if self.spec.kind == "sequence" and self.mutagenesis["enabled"]:
            metrics |= self._mutagenesis()
        return metrics

    # ------------------------------------------------------------------------------------------------- the parts

    def _layers(self) -> dict[str, str]:
        """`{module name: short name}` of the chosen layers."""
        found = list(mixers(self.net))
        chosen = range(len(found)) if self.layers is None else self.layers
        wrong = [i for i in chosen if not 0 <= i < len(found)]
        if wrong:
            raise ValueError(f"explain.layers: expected numbers from 0 to {len(found) - 1}, got {wrong}")
        return {found[i]: re.sub(r"^.*?blocks\.|\.?mixer$", "", found[i]) or found[i] for i in chosen}

    def _record(self, batch: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Scan]:
        with recording(self.net) as calls:
            self.run(batch["inputs"], batch.get("mask"))
        return {short: calls[name] for name, short in names.items()}

    def _statistics(self, names: Mapping[str, str]) -> dict[str, float]:
        positions = self.rows.choose(self.statistics["samples"], self.seed)
        recorded = (self._record(batch, names) for batch in self.rows.batches(positions))
        found = collect(recorded, self.statistics["max_values"], self.seed)
        values, table = found.values(), found.table()
        pq.write_table(pa.Table.from_pylist(table), self.folder / "scan_statistics.parquet")
        flat: dict[str, Any] = {
            f"{a}/{b}/{c}": v for a, ds in values.items() for b, parts in ds.items() for c, v in parts.items()
        }
        np.savez_compressed(self.folder / "scan_statistics.npz", **flat)
        self._save(draw.scan_statistics(values, found.tied, found.longest), "scan_statistics")
        self._save(draw.memory_by_head(values, found.longest), "memory_by_head")
        medians = {}
        for layer, directions in values.items():
            for direction, parts in directions.items():
                for name, value in parts.items():
                    medians[f"explain/{name}/layer_{layer}_{direction}"] = float(np.median(value))
        return medians

    def _matrices(self, names: Mapping[str, str]) -> dict[str, float]:
        positions = self._positions(self.matrices["samples"])
        arrays, worst = {}, 0.0
        for batch in self.rows.batches(positions):
            for i, name in enumerate(batch["id"]):
                length = int(batch["mask"][i].sum()) if "mask" in batch else None
                one: dict[str, Any] = {k: batch[k][i : i + 1, :length] for k in ("inputs", "mask") if k in batch}
                shown: dict[str, np.ndarray] = {}
                for layer, scan in self._record(one, names).items():
                    mixing = mixing_matrix(scan, max_length=self.matrices["max_length"])
                    heads = self._heads(len(mixing.matrix))
                    worst = max(worst, mixing.error)
                    shown[layer] = mixing.matrix[heads].float().numpy()
                    arrays |= {f"{name}/layer_{layer}": shown[layer], f"{name}/heads": np.array(heads)}
                figure = draw.mixing_matrices(shown, heads, f"y = M x: {name}")
                self._save(figure, f"mixing_{_file_name(name)}", "mixing_matrices")
        np.savez_compressed(self.folder / "mixing_matrices.npz", **arrays)
        assert worst < 1e-3, f"the mixing matrices do not give the scan's output: relative error {worst:.1e}"
        return {"explain/mixing_matrix_error": worst}

    def _heads(self, count: int) -> list[int]:
        chosen = list(range(count)) if self.heads is None else list(self.heads)
        wrong = [i for i in chosen if not 0 <= i < count]
        if wrong:
            raise ValueError(f"explain.heads: expected numbers from 0 to {count - 1}, got {wrong}")
        return chosen

    def _score(self, target: Target, inputs: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """The network's output as the score to be explained."""
        return target.score(self.run(inputs, mask), rows)

    def _saliency(self) -> None:
        ids, maps, pictures, captions = [], [], [], []
        for batch in self.rows.batches(self._positions(self.samples)):
            logits = self.run(batch["inputs"])
            target = choose_target(self.spec, self.target, logits, batch.get("label"))
            score = partial(self._score, target)
            maps.append(gradient_times_input(score, batch["inputs"]).cpu().numpy())
            pictures += [denormalise(self.spec, image) for image in batch["inputs"]]
            captions += self._captions(batch, logits, target.names)
            ids += batch["id"]
        found = np.concatenate(maps)
        np.savez_compressed(self.folder / "saliency.npz", id=ids, saliency=found, image=np.stack(pictures))
        self._save(draw.saliency_maps(np.stack(pictures), found, captions), "saliency")

    def _mutagenesis(self) -> dict[str, float]:
        spec, options = self.spec, self.mutagenesis
        letters = spec.letters[:-1]  # the last stands for unknown characters: nothing to change a letter into
        positions = self._positions(max(self.samples, options["samples"]))
        batches = list(self.rows.batches(positions))
        start, stop = self._window(max(b["inputs"].shape[1] for b in batches))
        first = options["first_position"]
        table: list[dict[str, Any]] = []
        values, tokens, names, drawn = [], [], [], 0
        for batch in batches:
            inputs, mask = batch["inputs"], batch["mask"]
            logits = self.run(inputs, mask)
            target = choose_target(spec, self.target, logits, batch.get("label"))
            window = (min(start, inputs.shape[1]), min(stop, inputs.shape[1]))
            size = self.rows.batch_size
            changes = mutate(partial(self._score, target), inputs, mask, len(letters), size, window)
            captions = self._captions(batch, logits, target.names)
            for i, name in enumerate(batch["id"]):
                own = inputs[i, window[0] : window[1]][mask[i, window[0] : window[1]]].cpu().numpy()
                change = changes[i, : len(own)].numpy()
                if not len(own):
                    raise ValueError(f"explain.mutagenesis.window: {name} has no character from {start} to {stop}")
                value = importance(change, own)
                values.append(value)
                tokens.append(own)
                names.append(self._class_name(batch, i) or target.names[i])
                table += _changes(name, target.names[i], own, change, spec.letters, first + start)
                if drawn < self.samples:
                    heights = letter_heights(value[None], own[None], len(letters))
                    text = captions[i].replace("\n", " ")
                    figure = logos.mutagenesis(change, heights, own, letters, text, first + start)
                    self._save(figure, f"mutagenesis_{_file_name(name)}", "mutagenesis")
                    drawn += 1
        pq.write_table(pa.Table.from_pylist(table), self.folder / "mutagenesis.parquet")
        if len({len(t) for t in tokens}) > 1:
            log.info("explain: no mean logo: the sequences have different lengths, and nothing says how they align")
            return {"explain/mutated_sequences": float(len(tokens))}
        groups = [mean_by_name(np.stack(a), names) for a in (values, tokens)]
        means: dict[str, Any] = {n: letter_heights(groups[0][n], groups[1][n], len(letters)) for n in groups[0]}
        np.savez_compressed(self.folder / "mutagenesis_mean.npz", letters=np.array(list(letters)), **means)
        counts = {name: len(v) for name, v in groups[0].items()}
        self._save(logos.mean_logos(means, counts, letters, first + start), "mutagenesis_mean")
        return {"explain/mutated_sequences": float(len(tokens))}

    def _window(self, longest: int) -> tuple[int, int]:
        """Positions to mutate, from 0, the second one excluded."""
        limit, window = self.mutagenesis["max_length"], self.mutagenesis["window"]
        start, stop = (0, longest) if window is None else window
        if not 0 <= start < stop:
            raise ValueError(f"explain.mutagenesis.window: expected [start, stop] with 0 <= start < stop, got {window}")
        stop = min(stop, longest)
        if start >= longest:
            raise ValueError(
                f"explain.mutagenesis.window: starts at {start}, but the longest sequence has {longest} characters"
            )
        if stop - start > limit:
            raise ValueError(
                f"explain.mutagenesis.max_length: expected at most {limit} positions, got {stop - start}; choose "
                "some by explain.mutagenesis.window=[start,stop], raise the limit, or explain.mutagenesis.enabled=false"
            )
        return start, stop

    # ------------------------------------------------------------------------------------------------- small parts

    def _positions(self, count: int) -> np.ndarray:
        return self.rows.choose(count, self.seed, self.ids)

    def _save(self, figure: Any, name: str, key: str | None = None) -> None:
        save_figure(self.trainer, figure, self.plot_dir, name, f"explain/{key or name}")

    def _class_name(self, batch: Mapping[str, Any], i: int) -> str | None:
        """The true class of a row that has one."""
        if "label" not in batch or self.spec.problem not in ("multiclass", "binary"):
            return None
        return self.spec.class_names[int(batch["label"][i])]

    def _captions(self, batch: Mapping[str, Any], logits: torch.Tensor, targets: Sequence[str]) -> list[str]:
        decisions = decide(self.spec, probabilities(self.spec, logits).cpu().numpy())
        captions = []
        for i, decision in enumerate(decisions):
            truth = self._class_name(batch, i)
            says = f"predicted {decision.text} {decision.score}".rstrip()
            why = "" if targets[i] == decision.text else f", explained: {targets[i]}"
            captions.append(f"{batch['id'][i]}{f' ({truth})' if truth else ''}\n{says}{why}")
        return captions


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)[:80]


def _changes(
    name: str, target: str, tokens: np.ndarray, change: np.ndarray, alphabet: str, first: int
) -> list[dict[str, Any]]:
    """A row a substitution."""
    return [
        {
            "id": name,
            "target": target,
            "position": first + i,
            "reference": alphabet[token - 1],
            "mutant": alphabet[k],
            "change": float(value),
        }
        for i, (token, row) in enumerate(zip(tokens, change, strict=True))
        for k, value in enumerate(row)
        if token != k + 1
    ]
