"""LoRA without regret for any LightningModule."""

from typing import TYPE_CHECKING

from lightning_lora.adapter import (
    disable_lora,
    inject_lora,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lightning_lora.adapter_io import load_adapter, save_adapter
from lightning_lora.config import LoRAConfig
from lightning_lora.counting import InjectionReport, ParameterCount, count_parameters
from lightning_lora.errors import (
    AdapterFileError,
    AlreadyShardedError,
    BaseMismatchError,
    ConfigError,
    DataError,
    GradientError,
    GuardError,
    LoRAError,
    RunFolderError,
    TargetNotFoundError,
)
from lightning_lora.functional.noise_scale import NoiseScale, noise_scale
from lightning_lora.layers import register_layer
from lightning_lora.layers.walk import lora_layers
from lightning_lora.matching import matched_rank
from lightning_lora.merge_report import MergeReport
from lightning_lora.roles import register_role

if TYPE_CHECKING:
    from lightning_lora.batch_probe import BatchProbe
    from lightning_lora.mixin import LoRAMixin

__all__ = [
    "AdapterFileError",
    "AlreadyShardedError",
    "BaseMismatchError",
    "BatchProbe",
    "ConfigError",
    "DataError",
    "GradientError",
    "GuardError",
    "InjectionReport",
    "LoRAConfig",
    "LoRAError",
    "LoRAMixin",
    "MergeReport",
    "NoiseScale",
    "ParameterCount",
    "RunFolderError",
    "TargetNotFoundError",
    "count_parameters",
    "disable_lora",
    "inject_lora",
    "load_adapter",
    "load_lora_state_dict",
    "lora_layers",
    "lora_state_dict",
    "matched_rank",
    "merge_lora",
    "noise_scale",
    "register_layer",
    "register_role",
    "remove_lora",
    "save_adapter",
    "unmerge_lora",
]


def __getattr__(name: str) -> object:
    # The core works without Lightning; only these need it.
    if name == "BatchProbe":
        from lightning_lora.batch_probe import BatchProbe

        return BatchProbe
    if name == "LoRAMixin":
        from lightning_lora.mixin import LoRAMixin

        return LoRAMixin
    raise AttributeError(f"module 'lightning_lora' has no attribute {name!r}")
