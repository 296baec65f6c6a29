"""LoRA without regret for any LightningModule.

The rooms, from the bottom up; each imports only from those before it. The ground: `errors`, `versions` (of installed
packages), `student_t` (its quantiles), `hub` (access to the Hugging Face hub), `batch_facts` (what the host knows of a
batch of tokens), `lightning_messages` (left out for a while), `effective_batch` (rows of an optimizer step),
`step_memory` (what a step keeps to be faster), `lightning_private` (private attributes of Lightning), `this_command`
(as it was typed), `allowed_imports` (packages that a config may name) and `trainer_access` (callbacks and run folder of
a Trainer). Then `lora` (LoRA on any module), `data` (rows to batches), `files` (adapter folders, merging, safetensors),
`sharding` (many devices), `checkpoints` (Lightning checkpoints and exact resume), `batch` (rows of a step and their
gradient noise), `mixin` (LoRA in a LightningModule), `memory` (of a step, traced), `capacity` (whether adapters have
room), `callbacks`, `tasks` (LightningModules ready to run), `planning` (before a run), `study` (runs compared) and
`cli` (the commands).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lightning_lora.errors import (
    AdapterFileError,
    AlreadyShardedError,
    BaseMismatchError,
    ConfigError,
    DataError,
    GradientError,
    GuardError,
    LoRAError,
    RewardError,
    RunFolderError,
    SamplerError,
    TargetNotFoundError,
)

if TYPE_CHECKING:
    from lightning_lora.batch.noise.noise_scale import NoiseScale, noise_scale
    from lightning_lora.files.adapter.save_load import load_adapter, save_adapter
    from lightning_lora.lora.adapter import (
        disable_lora,
        inject_lora,
        load_lora_state_dict,
        lora_state_dict,
        remove_lora,
    )
    from lightning_lora.lora.config import LoRAConfig
    from lightning_lora.lora.layers import register_layer
    from lightning_lora.lora.layers.adapted import lora_layers
    from lightning_lora.lora.matched_rank import matched_rank
    from lightning_lora.lora.merging import merge_lora, unmerge_lora
    from lightning_lora.lora.reports import InjectionReport, MergeReport, ParameterCount, count_parameters
    from lightning_lora.lora.targets.roles import register_role
    from lightning_lora.mixin.lora_mixin import LoRAMixin
    from lightning_lora.planning.make_plan import plan
    from lightning_lora.planning.plan import Plan
    from lightning_lora.step_memory import StepMemory
    from lightning_lora.study.batch_probe import BatchProbe
    from lightning_lora.study.matched.study import Study
    from lightning_lora.study.rank_probe import RankProbe

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
    "Plan",
    "RankProbe",
    "RewardError",
    "RunFolderError",
    "SamplerError",
    "StepMemory",
    "Study",
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
    "plan",
    "register_layer",
    "register_role",
    "remove_lora",
    "save_adapter",
    "unmerge_lora",
]

# Imported when first asked for: the command line starts without torch, and the core works without Lightning.
_MODULES = {
    "BatchProbe": "study.batch_probe",
    "InjectionReport": "lora.reports",
    "LoRAConfig": "lora.config",
    "LoRAMixin": "mixin.lora_mixin",
    "MergeReport": "lora.reports",
    "NoiseScale": "batch.noise.noise_scale",
    "ParameterCount": "lora.reports",
    "Plan": "planning.plan",
    "RankProbe": "study.rank_probe",
    "StepMemory": "step_memory",
    "Study": "study.matched.study",
    "count_parameters": "lora.reports",
    "disable_lora": "lora.adapter",
    "inject_lora": "lora.adapter",
    "load_adapter": "files.adapter.save_load",
    "load_lora_state_dict": "lora.adapter",
    "lora_layers": "lora.layers.adapted",
    "lora_state_dict": "lora.adapter",
    "matched_rank": "lora.matched_rank",
    "merge_lora": "lora.merging",
    "noise_scale": "batch.noise.noise_scale",
    "plan": "planning.make_plan",
    "register_layer": "lora.layers",
    "register_role": "lora.targets.roles",
    "remove_lora": "lora.adapter",
    "save_adapter": "files.adapter.save_load",
    "unmerge_lora": "lora.merging",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'lightning_lora' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"lightning_lora.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
