"""Starting from a trained model: `model.pretrained=` and `model.freeze=`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from bimamba.pretrained import describe, read_pretrained
from bimamba.spec import DataSpec, expect_same

if TYPE_CHECKING:
    from bimamba.models import Classifier

log = logging.getLogger(__name__)

# Options that change neither the weights' meaning nor what a trained model computes: pretraining and fine-tuning may
# differ in them; a network that has learned one strand may read both. Pooling and positions start anew where they
# differ.
FREE = re.compile(
    r"(_target_|pooling|embedding\.positions|checkpoint_blocks|(\w+_)?dropout|drop_path|layer_scale|pretrained|freeze"
    r"|rc_equivariant|mixer\.(dt_min|dt_max|dt_init_floor|conv_init|A_init_range|chunk_size|use_mem_eff_path|dropout)"
    r"|.*\._(partial|convert|recursive)_)(\..*)?"
)
POSITIONS = "embedding.positions.table"
# What may start anew; everything else has to come from the trained model.
RENEWED = ("pooling.", "head.", "embedding.positions.")


def load_pretrained(net: Classifier, source: str | Path) -> list[str]:
    """Puts a trained model's embedding and blocks into a classifier of the same architecture.

    Its head is taken where problem and class names are the same, else the head stays new; so do a pooling of another
    kind, and positions of sequences of another length. Positions of images of another size are resampled (Dosovitskiy
    et al. 2021, arXiv:2010.11929).

    Args:
        net: a `Classifier`.
        source: see `bimamba.pretrained.read_pretrained`.

    Returns:
        Names of the weights that stay new; they are logged, too.

    Raises:
        FileNotFoundError, ValueError: as of `read_pretrained`; or the trained model has another architecture, alphabet
            or number of channels.
    """
    given = read_pretrained(source)
    where = f"model.pretrained: {given.origin}"
    spec = net.spec
    expect_same(given.spec, spec, ("kind", "alphabet", "channels"), where)
    _expect_same_model(given.model, describe(net.arguments), where)
    own, state = net.state_dict(), dict(given.state)
    if POSITIONS in own and POSITIONS in state and spec.kind == "image":
        patches = hasattr(net.embedding, "grid")
        state[POSITIONS] = resample(state[POSITIONS], given.spec, spec, len(own[POSITIONS]), patches)
    new: list[str] = []
    for part in RENEWED:
        keys = {k for k in own.keys() | state.keys() if k.startswith(part)}
        same = all(k in own and k in state and own[k].shape == state[k].shape for k in keys)
        if part == "head.":
            same &= (given.spec.problem, given.spec.class_names) == (spec.problem, spec.class_names)
        if not same:
            new += sorted(keys & own.keys())
            state = {k: v for k, v in state.items() if k not in keys}
    differ = [k for k in own if k not in new and (k not in state or state[k].shape != own[k].shape)]
    differ += [k for k in state if k not in own]
    if differ:
        k = differ[0]
        there, here = (tuple(s[k].shape) if k in s else "missing" for s in (state, own))
        raise ValueError(f"{where} is another model: {len(differ)} weights differ ({k}: {there} there, {here} here)")
    net.load_state_dict({**own, **state})
    log.info("%s: %d tensors loaded; new: %s", where, len(state), ", ".join(new) or "none")
    return new


def _expect_same_model(there: Mapping[str, Any], here: Mapping[str, Any], where: str) -> None:
    """Options that both know and that decide what the model computes; weights alone do not tell (`mixer.shift`)."""
    a, b = _flat(there), _flat(here)
    differ = [k for k in sorted(a.keys() & b.keys()) if a[k] != b[k] and not FREE.fullmatch(k)]
    if differ:
        listed = "; ".join(f"{k}: {a[k]!r} there, {b[k]!r} here" for k in differ[:5])
        wanted = " ".join(f"model.{k}={a[k]}" for k in differ if not k.endswith("._target_"))
        hint = f". To fit it: {wanted}" if wanted and len(wanted) < 300 else ""
        raise ValueError(f"{where} is another model: {listed}{hint}")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif key == "_target_":  # one class may be named by two modules
            found[f"{prefix}{key}"] = str(value).rpartition(".")[2]
        else:
            found[f"{prefix}{key}"] = describe(list(value) if isinstance(value, tuple) else value)
    return found


def resample(table: Tensor, there: DataSpec, here: DataSpec, size: int, patches: bool = True) -> Tensor:
    """Learned positions `(n, d)` of an image's tokens on the grid of another image size, `(size, d)`, bicubic.

    `patches`: tokens are as high as wide. Otherwise each is a piece of a row of pixels; where those do not divide the
    rows, the tokens are a line.
    """
    if len(table) == size and (there.height, there.width) == (here.height, here.width):
        return table
    both = [(n, *spec.image_shape[1:]) for spec, n in ((there, len(table)), (here, size))]
    grids = []
    for n, height, width in both:
        rows = round((n * height / width) ** 0.5)
        if not patches:
            rows = height if all(count % pixels == 0 for count, pixels, _ in both) else 1
        grids.append((rows, n // rows))
    planes = table.float().T.unflatten(1, grids[0])[None]  # 1 d rows columns
    return F.interpolate(planes, grids[1], mode="bicubic", antialias=True)[0].flatten(1).T.to(table.dtype)


def frozen_parts(net: Classifier, freeze: str | int | None) -> list[nn.Module]:
    """The modules that `model.freeze` names, in evaluation mode, their parameters without gradients.

    Args:
        net: a `Classifier`.
        freeze: None; `"embedding"`; `"backbone"`: embedding and all blocks, so that pooling and head alone learn; or a
            number n: embedding and the first n blocks.

    Raises:
        ValueError: another value, or more blocks than there are.
    """
    blocks = list(net.backbone.blocks)
    if freeze is None:
        return []
    if freeze == "embedding":
        found: list[nn.Module] = [net.embedding]
    elif freeze == "backbone":
        found = [net.embedding, net.backbone]
    elif isinstance(freeze, int) and not isinstance(freeze, bool) and 0 < freeze <= len(blocks):
        found = [net.embedding, *blocks[:freeze]]
    else:
        raise ValueError(
            f"model.freeze: expected null, embedding, backbone, or a number of blocks from 1 to {len(blocks)}, "
            f"got {freeze!r}"
        )
    for module in found:
        module.requires_grad_(False).eval()
    return found
