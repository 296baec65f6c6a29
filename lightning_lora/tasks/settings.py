"""Settings that all tasks have, checked when a module is made."""

from __future__ import annotations

import math
from typing import Any

from lightning_lora.errors import ConfigError, did_you_mean
from lightning_lora.mixin.optim import check_learning_rate
from lightning_lora.tasks.schedule import SCHEDULES

BASE_DTYPES = ("float32", "bfloat16", "float16")


def check_settings(learning_rate: Any, weight_decay: Any, warmup_steps: Any, schedule: Any, dtype: Any) -> None:
    """Refuse values of the settings of `PretrainedTask`.

    Raises:
        ConfigError: If one is of another type, out of range or unknown.
    """
    check_learning_rate(learning_rate)
    if not isinstance(weight_decay, (int, float)) or not 0 <= weight_decay < math.inf:
        raise ConfigError(f"weight_decay must be a finite number of at least 0, got {weight_decay!r}.")
    if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or warmup_steps < 0:
        raise ConfigError(f"warmup_steps must be an integer of at least 0, got {warmup_steps!r}.")
    _check_choice("schedule", schedule, SCHEDULES)
    if dtype is not None:
        _check_choice("dtype", dtype, BASE_DTYPES)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")
