"""Dotted options in the config of a run, and such a config for what is given from Python."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer

from lightning_lora.errors import StudySettingError, did_you_mean

ARM_PARTS = ("trainer", "data")
"""Settings of an arm from Python that are not arguments of its module."""


def has_option(config: Mapping[str, Any], option: str) -> bool:
    """Whether a config has a dotted option, set or by default."""
    *above, name = option.split(".")
    place: Any = config
    for key in above:
        place = place.get(key) if isinstance(place, Mapping) else None
    return isinstance(place, Mapping) and name in place


def option_of(config: Mapping[str, Any], option: str, default: Any = None) -> Any:
    """The value of a dotted option."""
    place: Any = config
    for key in option.split("."):
        if not isinstance(place, Mapping) or key not in place:
            return default
        place = place[key]
    return place


def set_option(config: dict[str, Any], option: str, value: Any) -> None:
    """Set a dotted option whose group exists."""
    *above, name = option.split(".")
    place: Any = config
    for key in above:
        place = place[key]
    place[name] = value


def config_of(
    where: str,
    module: Callable[..., Any],
    data: Callable[..., Any] | None,
    arm: Mapping[str, Any],
    trainer: Mapping[str, Any],
) -> dict[str, Any]:
    """What a run of an arm is made of, in the shape of a config of ``fit`` and in plain values.

    Args:
        where: Whose settings they are, for a message.
        data: Makes the data module; None if there is none.

    Raises:
        ConfigError: If something takes no argument of a name that is given.
    """
    own = {name: value for name, value in arm.items() if name not in ARM_PARTS}
    parts: dict[str, Mapping[str, Any]] = {name: arm.get(name) or {} for name in ARM_PARTS}
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            raise StudySettingError(f"{where}: {name} must map names to settings, got {part!r}.")
    _check_names(where, module, {"learning_rate", *own})
    if data is not None:
        _check_names(where, data, parts["data"])
    _check_names(where, Trainer, {*trainer, *parts["trainer"]})
    made = {"class_path": data, "init_args": parts["data"]}
    return plain(
        {"model": {"class_path": module, "init_args": own}, "data": made, "trainer": {**trainer, **parts["trainer"]}}
    )


def plain(value: Any) -> Any:
    """A value as texts, numbers, lists and mappings, the same in every process."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _check_names(where: str, made: Callable[..., Any], names: Iterable[str]) -> None:
    """Refuse arguments that ``made`` does not take."""
    parameters = inspect.signature(made).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            called = getattr(made, "__name__", repr(made))
            raise StudySettingError(f"{where}: {called} takes no {name!r}{did_you_mean(name, parameters)}")
