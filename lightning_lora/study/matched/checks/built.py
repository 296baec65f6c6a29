"""The module of each arm, built and adapted once before a study begins: a target that matches nothing fails here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.errors import StudySettingError, user_error
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.targets.roles import hugging_face_models
from lightning_lora.memory.building import built_without_memory
from lightning_lora.memory.failures import TraceError
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.planning.advice.named_callbacks import with_lora_callback
from lightning_lora.study.bank.exactness import why_no_rows


@dataclass(frozen=True)
class BuiltArm:
    """What is known of the module of an arm before it runs.

    Args:
        kind: Name of its class.
        is_adapted: Whether it has adapters.
        has_model: Whether it holds a model of transformers.
        why_no_rows: Why its rows cannot be in one batch with those of other arms; "" if nothing speaks against it.
    """

    kind: str
    is_adapted: bool
    has_model: bool
    why_no_rows: str = ""


def build_arm(arm: str, make: Callable[[], LightningModule], callbacks: Any = None) -> BuiltArm | None:
    """Make the module of an arm, then build and adapt a copy of it without memory for weights.

    Args:
        callbacks: ``callbacks`` of its Trainer, among which `LoRA` adapts a module.

    Returns:
        What was built; None if that needs values, so that only a run can tell.

    Raises:
        ConfigError: If every run of the arm would fail in this way.
    """
    try:
        with kept_random_state(torch.device("cpu")), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its runs repeat them
            module = with_lora_callback(make(), callbacks)
            with built_without_memory(module) as built:
                layers, has_model = lora_layers(built), any(hugging_face_models(built))
                reason = why_no_rows(built._lora_module()) if isinstance(built, LoRAMixin) and layers else ""
                return BuiltArm(type(module).__name__, bool(layers), has_model, reason)
    except TraceError:
        return None
    except Exception as error:
        known = user_error(error)
        why = str(known) if known is not None else f"its module cannot be made: {type(error).__name__}: {error}"
        raise StudySettingError(f"arm {arm!r}: {why}") from error


def check_kept(arm: str, built: BuiltArm | None) -> None:
    """Refuse to keep whole models of an arm of which none can be kept.

    Raises:
        ConfigError: If its module has no adapters, and no model of transformers.
    """
    if built is not None and not built.is_adapted and not built.has_model:
        raise StudySettingError(
            f"--keep-models: arm {arm!r} trains {built.kind} in full, which holds no model of transformers, so no "
            f"model of it can be kept: leave the option out."
        )
