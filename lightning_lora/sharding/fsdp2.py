"""FSDP2 for Lightning, with settings that suit adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_lora.errors import StrategyError
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.sharding.deferred_gradients import deferred_gradients, drop_deferred, reduce_deferred


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` for fine-tuning: every process holds a shard of the model (FSDP2).

    It computes the same results as ``ModelParallelStrategy`` and differs in four ways:

    - All processes share the model by default. Lightning's "auto" puts the processes of a machine into tensor
      parallelism and shards nothing.
    - A checkpoint is one file by default, from which every other strategy can resume.
    - With adapters, this file is written without gathering the frozen weights, which it does not hold.
    - Gradients are communicated once per optimizer step, not after every micro-batch.

    The module must shard itself in ``configure_model``, as Lightning requires. The tasks of this package do so; in your
    own module write::

        def configure_model(self):
            self.apply_lora()
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                shard_lora(self.net, self.device_mesh)

    Args:
        data_parallel_size: Number of processes that share the model and split the data. "auto": all processes divided
            by ``tensor_parallel_size``.
        tensor_parallel_size: Number of processes that split each layer.
        save_distributed_checkpoint: Write a checkpoint as a folder of shards, including the frozen weights, instead of
            one file.
        defer_gradients: Communicate gradients once per optimizer step instead of once per micro-batch. Each process
            then holds the gradients of all trained parameters inside an accumulation window. None: defer only with
            adapters, whose gradients are small.
        process_group_backend: "nccl", "gloo", or None for the backend that fits the device.
        timeout: Longest time that a process waits for the others.
    """

    def __init__(
        self,
        data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = False,
        defer_gradients: bool | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )
        self.defer_gradients = defer_gradients

    @override
    def setup_environment(self) -> None:
        """Resolve a ``data_parallel_size`` of "auto" before the device mesh is made."""
        if self._data_parallel_size == "auto":
            assert isinstance(self._tensor_parallel_size, int)
            world_size = self.num_nodes * self.num_processes
            self._data_parallel_size = max(1, world_size // self._tensor_parallel_size)
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        """Refuse a module that has not sharded itself, because every process would train its own copy."""
        module = self.lightning_module
        assert module is not None
        if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            raise StrategyError(
                f"{type(module).__name__} does not shard itself: each process would train a copy of its own. In its "
                f"configure_model, after self.apply_lora(), call shard_lora(self.net, self.device_mesh) of "
                f"lightning_lora.sharding, where self.net is the submodule that computes; or use strategy='ddp'."
            )
        drop_deferred(module)
        super().setup(trainer)

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Defer gradients; Lightning uses this context for every micro-batch of a window but the last."""
        module = self.lightning_module
        assert module is not None
        if self.defer_gradients or (self.defer_gradients is None and lora_layers(module)):
            with deferred_gradients(module):
                yield
        else:
            yield

    @contextmanager
    def communicating_gradients(self) -> Iterator[None]:
        """Inside this context gradients are communicated after every micro-batch, even with ``defer_gradients``."""
        before, self.defer_gradients = self.defer_gradients, False
        try:
            yield
        finally:
            self.defer_gradients = before

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """State dict for a checkpoint; with adapters, one file is written without gathering the frozen weights."""
        module = self.lightning_module
        assert module is not None
        # A checkpoint inside a window must hold its gradients, and Lightning saves the weights before them.
        reduce_deferred(module)
        if self._save_distributed_checkpoint or not lora_layers(module):
            return super().lightning_module_state_dict()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(module, options=options)
