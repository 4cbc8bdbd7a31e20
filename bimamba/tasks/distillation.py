"""Knowledge distillation: a network, the student, learns from trained ones, its teachers, beside the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from bimamba.checkpoint import check_targets
from bimamba.models import Classifier
from bimamba.pretrained import PARTS, Pretrained, read_pretrained
from bimamba.spec import DataSpec, expect_same
from bimamba.tasks.base import Batch, run_network
from bimamba.tasks.compilation import GRAPH_MODES, compile_network

KEY = "task.distill.teachers"
# What a teacher's data and the student's have in common; statistics of images may differ, see `_Renormalised`.
SAME = ("kind", "problem", "class_names", "channels", "height", "width", "alphabet")


class Distillation:
    """What teachers say of a batch, and how far a student is from it (Hinton et al. 2015, arXiv:1503.02531).

    They see the very batch that the student sees, augmented, mixed and packed as it is (a "consistent" teacher: Beyer
    et al. 2022, arXiv:2106.05237). Several are one ensemble: their probabilities, or a regression's values, are
    averaged. Only training asks them: an evaluation, a checkpoint or an export of the student has none.

    No module, so that no state dict, optimizer, average of weights, DDP or FSDP meets the teachers, and none puts them
    into training mode.

    Args:
        spec: of the student's data.
        teachers: of each the folder of its run (whose best checkpoint is taken), a checkpoint of train.py, a folder of
            `save_pretrained`, or a repository of the Hub (these two do not say which rows they were trained on); its
            architecture may be another. None, or an empty list: nothing is distilled.
        weight: in [0, 1], share of this loss; the rest is the loss on labels.
        temperature: above 0; logits are divided by it, so that 2 or 4 tell more of the classes that come second.
        compile_options: of `compilation.compile_network`, for the teachers; None: they are not compiled.

    Raises:
        ValueError: an option out of range, or a temperature for regression.
    """

    def __init__(
        self,
        spec: DataSpec,
        teachers: Sequence[str | Path] | None = (),
        weight: float = 0.5,
        temperature: float = 1.0,
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        teachers = () if teachers is None else teachers
        listed = isinstance(teachers, Sequence) and not isinstance(teachers, str)
        if not listed or not all(isinstance(t, str | Path) for t in teachers):
            raise ValueError(f"{KEY}: expected a list of paths, got {teachers!r}")
        if weight is None or not 0 <= weight <= 1:
            raise ValueError(f"task.distill.weight: expected a number in [0, 1], got {weight}")
        if temperature is None or not 0 < temperature < float("inf"):
            raise ValueError(f"task.distill.temperature: expected a number above 0, got {temperature}")
        if spec.problem == "regression" and temperature != 1:
            raise ValueError(f"task.distill.temperature: expected 1 for regression, got {temperature}")
        self.spec, self.teachers = spec, [str(t) for t in teachers]
        self.weight, self.temperature = weight, temperature
        self.networks: list[nn.Module] = []
        self.compile_options = None if compile_options is None else dict(compile_options)
        if self.compile_options and self.compile_options.get("mode") in GRAPH_MODES:
            # CUDA graphs share one pool of memory, and where a new step begins there torch guesses by what has been
            # called since the last backward pass: not to be trusted with the student's activations (untested)
            self.compile_options["mode"] = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        return self  # never changes in training: the copy of a task (`callbacks.average`) needs no second one

    # ------------------------------------------------------------------------------------------------- the teachers

    def read(self, trusted_modules: Sequence[str] = ()) -> list[Pretrained]:
        """Builds the teachers, on the CPU: in evaluation mode, their parameters without gradients.

        Args:
            trusted_modules: modules besides `bimamba.nn` and `bimamba.models` that their parts may come from.

        Returns:
            What was read of each.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: no trained model, one of other data or another problem, or one with parts that are not trusted.
        """
        found = [read_pretrained(_best_of_run(path), KEY, trusted_modules) for path in self.teachers]
        with torch.random.fork_rng(devices=[]):  # a seed's batches are the same with teachers and without
            self.networks = [self._built(given, trusted_modules) for given in found]
        return found

    def place(self, precision: Precision, device: torch.device, trusted_modules: Sequence[str] = ()) -> None:
        """Moves the teachers to where the student trains, and to the dtype of its inputs; reads them if nobody has."""
        if not self.networks:
            self.read(trusted_modules)
        self.networks = [precision.convert_module(net).to(device) for net in self.networks]

    def _built(self, given: Pretrained, trusted_modules: Sequence[str]) -> nn.Module:
        where = f"{KEY}: {given.origin}"
        expect_same(given.spec, self.spec, SAME, where)
        if (given.spec.max_length or 0) < (self.spec.max_length or 0):
            raise ValueError(
                f"{where} has learned sequences of up to {given.spec.max_length} letters, and those of the student may "
                f"have {self.spec.max_length}; data.max_length and data.truncate shorten them"
            )
        try:
            check_targets(given.model, trusted_modules, "model", PARTS)
            net: nn.Module = Classifier.built(given)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if (given.spec.mean, given.spec.std) != (self.spec.mean, self.spec.std):
            net = _Renormalised(net, self.spec, given.spec)
        if self.compile_options is not None:
            compile_network(net, **self.compile_options)
        return net.eval().requires_grad_(False)

    # ----------------------------------------------------------------------------------------------------- the loss

    @torch.no_grad()
    def target(self, batch: Batch) -> Tensor:
        """The teachers' mean: probabilities at the temperature `(b, variables, values)`, see `_log_probabilities`, or
        a regression's values `(b, k)`; float32."""
        outputs = [run_network(net, batch).float() for net in self.networks]
        if self.spec.problem != "regression":
            outputs = [self._log_probabilities(logits).exp() for logits in outputs]
        return torch.stack(outputs).mean(0)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Distance of each sample's output from the target, float32 `(b)`; 0 where they agree.

        The Kullback-Leibler divergence of the softened distributions, times the squared temperature, so that its
        gradient stays as large as that of the labels' loss; multilabel: the mean over the labels. Regression: the mean
        squared difference.

        Args:
            logits: of the student, `(b, outputs)`.
            target: as of `target`.
        """
        logits = logits.float()
        if self.spec.problem == "regression":
            return (logits - target).square().mean(-1)
        divergence = F.kl_div(self._log_probabilities(logits), target, reduction="none").sum(-1)
        return self.temperature**2 * divergence.mean(-1)

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        """Logits `(b, outputs)` to log-probabilities at the temperature, `(b, variables, values)`: multiclass one
        variable with k values; binary and multilabel a variable with two values an output, no and yes."""
        soft = logits / self.temperature
        if self.spec.problem == "multiclass":
            return soft[:, None].log_softmax(-1)
        return torch.stack([F.logsigmoid(-soft), F.logsigmoid(soft)], dim=-1)


class _Renormalised(nn.Module):
    """A network of images for inputs `(b, c, height, width)` that were normalised by other statistics than its own."""

    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, inputs: DataSpec, own: DataSpec) -> None:
        super().__init__()
        self.net = net
        (mean, std), (own_mean, own_std) = (_statistics(spec) for spec in (inputs, own))
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def forward(self, inputs: Tensor, *others: Tensor | None) -> Tensor:
        return self.net(inputs * self.scale + self.shift, *others)


def _statistics(spec: DataSpec) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, `(c, 1, 1)`; of images that are not normalised 0 and 1."""
    channels = spec.image_shape[0]
    mean, std = (torch.tensor(v or [other] * channels) for v, other in ((spec.mean, 0.0), (spec.std, 1.0)))
    return mean[:, None, None], std[:, None, None]


def _best_of_run(path: str) -> Path | str:
    """A run's best checkpoint; other paths and names as they are."""
    checkpoints = Path(path).expanduser() / "checkpoints"
    return checkpoints / "best.ckpt" if checkpoints.is_dir() else path
