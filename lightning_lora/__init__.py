"""LoRA without regret for any LightningModule.

The rooms, from the bottom up; each imports from those before it only. On the ground `errors`, `hub` (hub access),
`effective_batch` (rows of an optimizer step) and `lightning_private` (private attributes of Lightning). Then `lora`
(LoRA on any module), `data` (rows to batches), `files` (what is written and read back), `sharding` (many devices),
`checkpoints`, `mixin` (LoRA in a LightningModule), `batch` (the rows of a step and their noise), `callbacks`, `tasks`
(LightningModules ready to run), `study` (runs compared), `cli`.
"""

from typing import TYPE_CHECKING

from lightning_lora.batch.noise.noise_scale import NoiseScale, noise_scale
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
from lightning_lora.files.adapter.save_load import load_adapter, save_adapter
from lightning_lora.lora.adapter import (
    disable_lora,
    inject_lora,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers import register_layer
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.matched_rank import matched_rank
from lightning_lora.lora.reports import InjectionReport, MergeReport, ParameterCount, count_parameters
from lightning_lora.lora.targets.roles import register_role

if TYPE_CHECKING:
    from lightning_lora.mixin.lora_mixin import LoRAMixin
    from lightning_lora.study.batch_probe import BatchProbe

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
        from lightning_lora.study.batch_probe import BatchProbe

        return BatchProbe
    if name == "LoRAMixin":
        from lightning_lora.mixin.lora_mixin import LoRAMixin

        return LoRAMixin
    raise AttributeError(f"module 'lightning_lora' has no attribute {name!r}")
