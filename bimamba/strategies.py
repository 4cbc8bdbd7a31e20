"""Sharding over several processes: Lightning's FSDP by blocks, with clipping, and on CPUs too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    OptimStateKeyType,
    StateDictType,
)
from torch.optim import Optimizer

from bimamba.nn.block import Block


class ShardedStrategy(FSDPStrategy):
    """Lightning's `FSDPStrategy` with one shard a block, whole checkpoints, and gloo on CPUs.

    Lightning refuses FSDP without GPUs; torch (2.13) trains all the same once it is told the device, but its way of
    gathering whole weights on a CPU (`offload_to_cpu`) hands out memory that is freed a moment later and crashes. Here
    whole weights are copied before. That is for trying a sharded run where there are no GPUs; on GPUs nothing of it
    is used.

    Args:
        options: those of Lightning's strategy. `state_dict_type` is `full`: checkpoints are as those of one process.

    Raises:
        ValueError: another `state_dict_type`.
    """

    def __init__(self, **options: Any) -> None:
        if options.setdefault("state_dict_type", "full") != "full":
            raise ValueError(
                "trainer.strategy.state_dict_type: expected full, since evaluations read checkpoints as one file, got "
                f"{options['state_dict_type']!r}"
            )
        options.setdefault("auto_wrap_policy", {Block})
        super().__init__(**options)

    @property
    def _on_cpu(self) -> bool:
        return self.root_device.type == "cpu"

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError("this network was sharded before: make it anew, or run stage=test from its checkpoint")
        if not self._on_cpu:
            return super()._setup_model(model)
        return FullyShardedDataParallel(
            module=model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights; on the first process alone where there are GPUs."""
        if not self._on_cpu:
            return super().lightning_module_state_dict()
        assert self.model is not None
        with _whole(self.model):
            return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's whole state, in the format of one process."""
        if not self._on_cpu:
            return super().optimizer_state(optimizer)
        assert self.model is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning wraps it
        with _whole(self.model):
            state = FullyShardedDataParallel.optim_state_dict(self.model, optimizer)
        return FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, self.model)


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    with FullyShardedDataParallel.state_dict_type(
        model,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=False),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False),
    ):
        yield
