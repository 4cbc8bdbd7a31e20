"""Several processes: Lightning's DDP without its detours, and its FSDP by blocks, with clipping, and on CPUs too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    StateDictType,
)
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.optim import Optimizer

from bimamba.nn.block import Block

ONLY_TORCHS = (
    *("find_unused_parameters", "static_graph", "broadcast_buffers", "ddp_comm_hook", "process_group"),
    *("mixed_precision", "delay_all_reduce_named_params", "param_to_hook_all_reduce", "device_mesh"),
    *("skip_all_reduce_unused_params", "forward_sync_buffers"),
)
SMALL = 32 * 2**20  # bytes of gradients: 0.2 ms between GPUs with NVLink, a few over PCIe


class ReplicatedStrategy(DDPStrategy):
    """Lightning's `DDPStrategy` for small networks too, which are bound by what the host has to do in a step.

    * Gradients of a small network are averaged in one message behind the backward pass. torch's
      `DistributedDataParallel` averages them while the pass goes on, bucket by bucket, for which the host stops at each
      parameter; what it hides is for few parameters less than that.
    * Where it is used it is not told its device, on which the batch is already. Told, torch walks through every id of
      the batch (2.6 ms of the host for 1,024, on a 2-core x86-64 machine), and Lightning builds it on a CUDA stream of
      its own, so that each parameter's gradient waits for the stream of the backward pass.

    Args:
        overlap: average gradients while the backward pass goes on, by `DistributedDataParallel`. None: where they are
            larger than `SMALL`, or with an option that it alone has (`ONLY_TORCHS`).
        options: Lightning's, and those of `DistributedDataParallel`.

    Raises:
        ValueError: `overlap` is neither true, false nor None, or false with such an option.
        RuntimeError: (in training, without overlap) gradients that cannot be averaged: of parameters that were not
            used, sparse ones, or those of a backward pass that does not begin at the loss.
    """

    def __init__(self, *args: Any, overlap: bool | None = None, **options: Any) -> None:
        if overlap is not None and not isinstance(overlap, bool):
            raise ValueError(f"trainer.strategy.overlap: expected true, false or null, got {overlap!r}")
        asked = [name for name in ONLY_TORCHS if options.get(name)]
        if overlap is False and asked:
            raise ValueError(f"trainer.strategy.{asked[0]}: expected trainer.strategy.overlap=true or null with it")
        super().__init__(*args, **options)
        self._overlap = True if asked else overlap
        self._blocked = False  # while gradients of several batches are added up
        self._due = False  # a backward pass has begun behind which gradients are to be averaged
        self._replicas: list[tuple[str, nn.Parameter]] = []  # what is averaged here, not by DistributedDataParallel

    def determine_ddp_device_ids(self) -> None:
        return None

    def configure_ddp(self) -> None:
        assert self.model is not None
        named = list(self.model.named_parameters())
        size = sum(p.numel() * p.element_size() for _, p in named if p.requires_grad)
        self._replicas = []
        if self._overlap or (self._overlap is None and size > SMALL):
            return super().configure_ddp()
        with torch.no_grad():
            for tensor in chain(self.model.parameters(), self.model.buffers()):
                torch.distributed.broadcast(tensor, 0)
        self._replicas = named

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        self._blocked = True
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._blocked = False

    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        self._due = bool(self._replicas) and not self._blocked
        if self._due:
            # Called by autograd when all gradients are there, before any hook of callbacks sees them
            closure_loss.register_hook(lambda _: Variable._execution_engine.queue_callback(self._average))

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        due, self._due = self._due, False
        if due:
            raise RuntimeError(
                "the backward pass was expected to begin at the loss that training_step returned, and did not: its "
                "gradients cannot be averaged behind it; trainer.strategy.overlap=true allows for it"
            )

    @torch.no_grad()
    def _average(self) -> None:
        self._due = False
        found = {name: p.grad for name, p in self._replicas if p.requires_grad}
        if unused := [name for name, gradient in found.items() if gradient is None]:
            raise RuntimeError(
                f"gradients of all parameters were expected, and {len(unused)} got none ({', '.join(unused[:3])}): the "
                "processes cannot average them; trainer.strategy.find_unused_parameters=true allows for it"
            )
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for name, gradient in found.items():
            assert gradient is not None
            if gradient.is_sparse:
                raise RuntimeError(
                    f"dense gradients were expected, and that of {name} is sparse; "
                    "trainer.strategy.overlap=true allows for it"
                )
            kinds.setdefault(gradient.dtype, []).append(gradient)
        for gradients in kinds.values():
            message = torch.cat([g.reshape(-1) for g in gradients]).div_(self.world_size)
            torch.distributed.all_reduce(message)
            parts = message.split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])


def take_over_ddp() -> None:
    """`ReplicatedStrategy` for `trainer.devices=4` without a strategy, and for `trainer.strategy=ddp`, too."""
    StrategyRegistry.register(
        "ddp", ReplicatedStrategy, override=True, start_method="popen", gradient_as_bucket_view=True
    )


class ShardedStrategy(FSDPStrategy):
    """Lightning's `FSDPStrategy` with one shard a (large) block, checkpoints as those of one process, and gloo on CPUs.

    What differs:

    * With `precision=bf16-mixed` or `16-mixed` parameters stay float32 and autocast alone decides what is computed in
      16 bits, as it does without sharding. Lightning has FSDP cast every parameter, `A_log`, `dt_bias` and `D` too,
      whose decays over thousands of tokens bf16 cannot tell apart, and sum gradients over processes in 16 bits.
      `trainer.strategy.mixed_precision` still chooses something else.
    * The optimizer's state is numbered by its groups, as every optimizer numbers it; Lightning (2.6) numbers it in the
      network's order, in which the state of one process or of `trainer=ddp` goes to the wrong parameters.
    * Lightning refuses FSDP without GPUs; torch (2.13) trains all the same once it is told the device, but its way of
      gathering whole weights on a CPU (`offload_to_cpu`) hands out memory that is freed a moment later and crashes.
      There whole weights are copied before.

    Args:
        min_unit: parameters of a block that is gathered by itself. To gather one costs the host the same whatever its
            size, so smaller ones come with the rest of the network, all at once.
        options: those of Lightning's strategy; `auto_wrap_policy` goes before `min_unit`. `state_dict_type` is `full`:
            checkpoints are as those of one process.

    Raises:
        ValueError: another `state_dict_type`, a `min_unit` that is no number; (in setup) a compiled network, or one
            that was sharded before.
    """

    def __init__(self, *, min_unit: float = 1_000_000, **options: Any) -> None:
        if options.setdefault("state_dict_type", "full") != "full":
            raise ValueError(
                "trainer.strategy.state_dict_type: expected full, since evaluations read checkpoints as one file, got "
                f"{options['state_dict_type']!r}"
            )
        if not isinstance(min_unit, int | float) or min_unit < 0:
            raise ValueError(f"trainer.strategy.min_unit: expected a number of parameters, 0 or more, got {min_unit!r}")
        options.setdefault("auto_wrap_policy", CustomPolicy(partial(_is_unit, min_unit)))
        super().__init__(**options)

    @property
    def _on_cpu(self) -> bool:
        return self.root_device.type == "cpu"

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        if self.mixed_precision is None and self.precision_plugin.precision in ("bf16-mixed", "16-mixed", "32-true"):
            return None
        return super().mixed_precision_config

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError("this network was sharded before: make it anew, or run stage=test from its checkpoint")
        if any(module._compiled_call_impl is not None for module in model.modules()):
            raise ValueError(
                "task.compile: expected false with trainer=fsdp, whose blocks gather their weights between each other, "
                "which one graph of the whole network cannot hold; trainer=ddp compiles"
            )
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
        assert self.model is not None
        with self._whole(first_alone=True):
            state = self.model.state_dict()
            return {name: value.detach().clone() for name, value in state.items()} if self._on_cpu else state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's whole state, as of one process; on the first process alone where there are GPUs."""
        assert self.model is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning wraps it
        with self._whole(first_alone=True):
            state = FullyShardedDataParallel.optim_state_dict(self.model, optimizer)
        if not state:
            return state
        names = [name for group in state["param_groups"] for name in group["params"]]
        return _renamed(state, {name: number for number, name in enumerate(names)})

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights, and in training the optimizers' states, each process its shards; whoever saved them, also one
        process.

        Raises:
            ValueError: a checkpoint of another number of optimizers.
        """
        assert self.model is not None and self.lightning_module is not None
        # Safe, whatever was asked for: these files hold tensors and plain values
        checkpoint = torch.load(self.broadcast(checkpoint_path), map_location="cpu", mmap=True, weights_only=True)
        training = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        with self._whole(first_alone=False):
            weights = checkpoint.pop("state_dict")
            self.model.load_state_dict(weights, strict=self.lightning_module.strict_loading)
            states = checkpoint.get("optimizer_states", []) if training else []
            if training and len(states) != len(self.optimizers):
                raise ValueError(f"expected the states of {len(self.optimizers)} optimizer(s), got {len(states)}")
            names = {p: _plain(n) for n, p in self.model.named_parameters()}
            for optimizer, state in zip(self.optimizers, states, strict=False):
                numbers = [number for group in state["param_groups"] for number in group["params"]]
                own = [names[p] for group in optimizer.param_groups for p in group["params"]]
                state = _renamed(state, dict(zip(numbers, own, strict=True)))
                optimizer.load_state_dict(
                    FullyShardedDataParallel.optim_state_dict_to_load(self.model, optimizer, state)
                )
        return checkpoint

    @contextmanager
    def _whole(self, first_alone: bool) -> Iterator[None]:
        """States of the network and its optimizers are whole: on each process, or where GPUs make it dear (they would
        hold it all) in the memory of the first one's host."""
        options = {"offload_to_cpu": not self._on_cpu, "rank0_only": first_alone and not self._on_cpu}
        assert self.model is not None
        with FullyShardedDataParallel.state_dict_type(
            self.model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(**options),
            FullOptimStateDictConfig(**options),
        ):
            yield


def is_sharded(strategy: Strategy) -> bool:
    """Whether a process holds a part of the parameters alone."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def _is_unit(least: float, module: nn.Module) -> bool:
    return isinstance(module, Block) and sum(p.numel() for p in module.parameters()) >= least


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other keys for its parameters."""
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}


def _plain(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")
