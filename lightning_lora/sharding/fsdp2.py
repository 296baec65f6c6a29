"""FSDP2 for Lightning with the settings that adapters want."""

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

from lightning_lora.errors import ConfigError
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.sharding.deferred_gradients import deferred_gradients, drop_deferred, reduce_deferred


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` for fine-tuning: every process holds a part of the model (FSDP2).

    It computes what ``ModelParallelStrategy`` computes, and differs in four ways. All processes share the model by
    default, where Lightning's "auto" puts every process of a machine into tensor parallelism and shards nothing.
    Checkpoints are one file by default, which resumes under any other strategy. With adapters such a file is written
    without gathering the frozen weights, which it does not hold. And inside an accumulation window gradients are not
    communicated: once per optimizer step is enough.

    The module shards itself in ``configure_model``, as Lightning asks; the tasks of this package do. In your own::

        def configure_model(self):
            self.apply_lora()
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                shard_lora(self.net, self.device_mesh)

    Args:
        data_parallel_size: Processes that share the model and split the data. "auto": all of them, divided by
            ``tensor_parallel_size``.
        tensor_parallel_size: Processes that split the layers themselves.
        save_distributed_checkpoint: Write checkpoints as a folder of shards, whole with the frozen weights, instead of
            one file.
        defer_gradients: Communicate gradients once per optimizer step instead of once per micro-batch; each process
            then holds the gradients of all trained parameters inside an accumulation window. None: with adapters,
            whose gradients are small.
        process_group_backend: "nccl", "gloo", or None for the one that fits the device.
        timeout: How long a process waits for the others.
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
        """Divide the processes: all of them share the data unless told otherwise."""
        if self._data_parallel_size == "auto":
            assert isinstance(self._tensor_parallel_size, int)
            world_size = self.num_nodes * self.num_processes
            self._data_parallel_size = max(1, world_size // self._tensor_parallel_size)
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        """Refuse a module that has not sharded itself: every process would train a copy of its own."""
        module = self.lightning_module
        assert module is not None
        if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            raise ConfigError(
                f"{type(module).__name__} does not shard itself: each process would train a copy of its own. In its "
                f"configure_model, after self.apply_lora(), call shard_lora(self.net, self.device_mesh) of "
                f"lightning_lora.sharding with the submodule that computes; or use strategy='ddp'."
            )
        drop_deferred(module)
        super().setup(trainer)

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Defer gradients; Lightning enters this for every micro-batch but the last of a window."""
        module = self.lightning_module
        assert module is not None
        if self.defer_gradients or (self.defer_gradients is None and lora_layers(module)):
            with deferred_gradients(module):
                yield
        else:
            yield

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint; frozen weights, which one file with adapters does not hold, are not gathered."""
        module = self.lightning_module
        assert module is not None
        # A checkpoint inside a window holds its gradients, and Lightning asks for the weights first.
        reduce_deferred(module)
        if self._save_distributed_checkpoint or not lora_layers(module):
            return super().lightning_module_state_dict()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(module, options=options)
