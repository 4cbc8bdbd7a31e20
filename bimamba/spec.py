"""What a model and a task must know of the data: the one contract between the data room and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

KINDS = ("image", "sequence")
PROBLEMS = ("multiclass", "binary", "multilabel", "regression")


@dataclass(frozen=True)
class DataSpec:
    """Shape and meaning of a data set's inputs and labels. Saved in every checkpoint, checked at evaluation.

    Args:
        kind: `"image"` (inputs `(b, c, height, width)`, float) or `"sequence"` (token ids `(b, l)`, int64).
        problem: `"multiclass"`, `"binary"` (one logit; the positive class is `class_names[1]`), `"multilabel"`
            or `"regression"`.
        class_names: sorted class names; for multilabel the label names, for regression the target names.
        channels, height, width: of an image, after resizing and cropping.
        mean, std: per-channel statistics that images (in [0, 1]) were normalised by.
        alphabet: the characters of token ids 1, 2, … of a sequence; id 0 is padding. The last character stands for
            every unknown one (DNA: `"ACGTN"`).
        max_length: the longest sequence in tokens.

    Raises:
        ValueError: a field is missing for the kind, or has a value outside its set.
    """

    kind: str
    problem: str
    class_names: tuple[str, ...]
    channels: int | None = None
    height: int | None = None
    width: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    alphabet: str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("class_names", "mean", "std"):  # lists come back from checkpoints and YAML
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {self.kind!r}")
        if self.problem not in PROBLEMS:
            raise ValueError(f"problem: expected one of {PROBLEMS}, got {self.problem!r}")
        needed = ("channels", "height", "width") if self.kind == "image" else ("alphabet", "max_length")
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"a spec of kind {self.kind!r} needs {', '.join(missing)}")
        least = {"multiclass": 2, "binary": 2, "multilabel": 1, "regression": 1}[self.problem]
        exact = self.problem == "binary" and len(self.class_names) != 2
        if len(self.class_names) < least or exact:
            raise ValueError(
                f"class_names: a {self.problem} problem needs {'exactly' if self.problem == 'binary' else 'at least'} "
                f"{least}, got {list(self.class_names)}"
            )

    @property
    def num_outputs(self) -> int:
        """Number of logits (or regression outputs)."""
        return 1 if self.problem == "binary" else len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of images."""
        assert self.channels is not None and self.height is not None and self.width is not None, "data are no images"
        return self.channels, self.height, self.width

    @property
    def letters(self) -> str:
        """The alphabet of sequences."""
        assert self.alphabet is not None, "data are no sequences"
        return self.alphabet

    @property
    def longest(self) -> int:
        """The most tokens of a sequence."""
        assert self.max_length is not None, "data are no sequences"
        return self.max_length

    @property
    def num_tokens(self) -> int:
        """Size of a sequence's vocabulary, padding included."""
        return len(self.letters) + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers: loads under `weights_only=True` and prints as JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataSpec:
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown key.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown keys in a data spec: {unknown}")
        return cls(**values)


def expect_same(there: DataSpec, here: DataSpec, names: Sequence[str], where: str) -> None:
    """Checks that a trained model's data and those at hand agree.

    Args:
        there, here: of the model, and at hand.
        names: the fields that matter.
        where: the option and the model, for the message.

    Raises:
        ValueError: one of them differs.
    """
    for name in names:
        a, b = getattr(there, name), getattr(here, name)
        if a != b:
            hint = f"; to fit it set data.{name}={a}" if name in ("alphabet", "channels") else ""
            raise ValueError(f"{where} was trained on data of another {name}: {a!r} there, {b!r} here{hint}")


def spec_of(owner: Any) -> DataSpec:
    """The `spec` of a task or network, for those who know it as a plain module."""
    found = owner.spec
    assert isinstance(found, DataSpec)
    return found
