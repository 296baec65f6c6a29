"""Splitting a pretrained model among devices, and the strategies that cannot load one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh

from lightning_lora.errors import QuantisationError
from lightning_lora.sharding import parallelize_lora, shard_lora

if TYPE_CHECKING:  # the module imports torchao, bitsandbytes and peft
    from transformers import PreTrainedModel


def check_loadable(trainer: Trainer | None) -> None:
    """Refuse a strategy under which transformers cannot load weights.

    Raises:
        ConfigError: Under DeepSpeed ZeRO-3.
    """
    strategy = getattr(trainer, "strategy", None)
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        # ZeRO-3 splits parameters as they are made, so that transformers would find nothing to fill.
        raise QuantisationError(
            "a pretrained model cannot be loaded under DeepSpeed ZeRO-3: use stage 2, or "
            "lightning_lora.sharding.FSDP2Strategy, which splits the model as ZeRO-3 does."
        )


def shard_model(model: PreTrainedModel, trainer: Trainer | None) -> None:
    """Apply tensor parallelism and FSDP2 to an adapted model if the strategy is a `ModelParallelStrategy`.

    Raises:
        ConfigError: If the heads or layers cannot be split evenly, or the model has no tensor-parallel plan.
    """
    strategy = getattr(trainer, "strategy", None)
    if not isinstance(strategy, ModelParallelStrategy):
        return
    mesh = strategy.device_mesh
    if mesh["tensor_parallel"].size() > 1:
        _parallelize(model, mesh["tensor_parallel"])
    shard_lora(model, mesh)


def _parallelize(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    config = model.config.get_text_config()
    counts = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    odd = [f"{name}={count}" for name, count in counts.items() if count and count % mesh.size()]
    if odd:
        raise QuantisationError(f"tensor_parallel_size={mesh.size()} does not divide {' and '.join(odd)} of the model.")
    parallelize_lora(model, mesh, getattr(model, "_tp_plan", None) or {})
