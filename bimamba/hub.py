"""`save_pretrained`, `from_pretrained` and `push_to_hub`, as users of the Hugging Face Hub know them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from safetensors.torch import save
from torch import nn

from bimamba.checkpoint import load_weights
from bimamba.files import write_whole
from bimamba.model_card import model_card
from bimamba.pretrained import (
    MARKS,
    NOT_SAVED,
    WEIGHTS,
    Pretrained,
    describe,
    find_folder,
    parts,
    read_folder,
    write_config,
)
from bimamba.spec import DataSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HubModel(nn.Module, ModelHubMixin, library_name="bimamba"):
    """What makes a module with `spec` and `arguments` one of the Hub. Mixed into `bimamba.models.Classifier`.

    From `ModelHubMixin`: `save_pretrained(folder, model_card_kwargs=…)`, which writes `config.json`,
    `model.safetensors` and, where there is none, `README.md`; and `push_to_hub(repo_id)`. `model_card_kwargs` are the
    arguments of `bimamba.model_card.model_card`.
    """

    spec: DataSpec
    arguments: dict[str, Any]

    def _save_pretrained(self, save_directory: Path) -> None:
        write_config(save_directory, self.spec, describe(self.arguments))
        # Each tensor by itself: safetensors refuses views, and shared storage.
        state = {k: v.detach().cpu().contiguous().clone() for k, v in self.state_dict().items()}
        # Not save_file, which would make it unreadable for others.
        write_whole(save_directory / WEIGHTS, save(state, metadata={"format": "pt"}))

    @classmethod
    def from_pretrained(  # type: ignore[override]  # no **model_kwargs: a typing error must not be swallowed
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        trusted_modules: Sequence[str] = (),
        dtype: torch.dtype | None = None,
    ) -> HubModel:
        """The model of a folder or of a repository of the Hub, on the CPU and in evaluation mode. Runs no code of it.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote, or `user/model`.
            force_download, token, cache_dir, local_files_only, revision: as of `huggingface_hub.snapshot_download`.
            trusted_modules: modules besides `bimamba.nn` and `bimamba.models` that its parts may come from.
            dtype: of all parameters, as by `model.to(dtype)`, and so of the images that it is given; None: float32,
                whatever was saved. `A_log`, `dt_bias` and `D` are rounded with the rest (the scan reckons with them in
                float32 all the same); float32 under `torch.autocast` rounds none of them.

        Raises:
            FileNotFoundError: no such folder or repository, or one of its files is missing.
            ValueError: a damaged file, a part that is not trusted, weights that do not fit the configuration, or
                another dtype.
        """
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype: expected None or one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        folder = find_folder(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        return cls.built(read_folder(folder, trusted_modules)).to(dtype)

    @classmethod
    def built(cls, given: Pretrained) -> HubModel:
        """A model that was read, whose configuration `check_targets` has passed; on the CPU and in evaluation mode.

        Raises:
            ValueError: the configuration describes no such model, or the weights do not fit it.
        """
        arguments = {k: v for k, v in given.model.items() if k not in (*MARKS, *NOT_SAVED)}
        try:
            model = cls(given.spec, **parts(arguments))
        except (TypeError, AttributeError) as error:  # arguments that this version does not know, or of a wrong type
            raise ValueError(
                f"{given.origin}: its configuration describes no model of this version ({error})"
            ) from error
        load_weights(model, {"state_dict": given.state})
        return model.eval()

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any) -> str:
        """As of `ModelHubMixin`; the card has the repository's name, unless `model_card_kwargs` says another."""
        return super().push_to_hub(repo_id, model_card_kwargs={"name": repo_id} | (model_card_kwargs or {}), **options)

    def generate_model_card(self, **facts: Any) -> ModelCard:
        """The text of README.md; `facts` as of `bimamba.model_card.model_card`."""
        return model_card(self, **facts)
