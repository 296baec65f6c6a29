"""Arms of equal size: the rank at which other targets have as many adapter parameters as another arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_lora.cli.study.fit_config import fit_objects
from lightning_lora.errors import StudySettingError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.matched_rank import matched_rank
from lightning_lora.study.matched.options import option_of
from lightning_lora.study.matched.spec import ArmSpec
from lightning_lora.tasks.pretrained import PretrainedTask

LORA = "model.init_args.lora"


def rank_like(arm: ArmSpec, other: ArmSpec) -> int:
    """The rank at which ``arm`` has as nearly as possible the number of adapter parameters that ``other`` has.

    Raises:
        ConfigError: If one of them has no ``lora``, or no rank is large enough.
    """
    own, like = (_lora(each) for each in (arm, other))
    module, _ = fit_objects(arm.config)
    root = module._meta_model() if isinstance(module, PretrainedTask) else module
    return matched_rank(root, own.targets, like)


def _lora(arm: ArmSpec) -> LoRAConfig:
    settings: Mapping[str, Any] | None = option_of(arm.config, LORA)
    if not settings:
        raise StudySettingError(f"matched_rank compares adapters, and arm {arm.name!r} has no {LORA}.")
    return LoRAConfig(**settings)
