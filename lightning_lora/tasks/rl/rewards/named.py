"""A reward of the user's own, by the name of its function."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from lightning_lora.allowed_imports import ALLOW_VARIABLE, allowed, look_in_working_folder
from lightning_lora.errors import RewardSettingError, did_you_mean
from lightning_lora.tasks.rl.rewards.worker import Reward

_OURS = "lightning_lora"


class NamedReward:
    """Calls a function that is named in a config, such as ``my_rewards.short_and_right``.

    Its module is imported only if the user allows it, as for the classes that a config names:
    ``lightning-lora --allow my_rewards fit ...``.

    Args:
        function: The dotted name of a function, or of anything else that can be called.

    Raises:
        ConfigError: If the module is not allowed, cannot be imported, or has no such function.
    """

    def __init__(self, function: str) -> None:
        self.function = function
        self.__name__ = function.rpartition(".")[2]
        self._reward = find_reward(function)
        self.sees_all_rows = bool(getattr(self._reward, "sees_all_rows", False))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> Any:
        """What the function returns."""
        return self._reward(prompts=prompts, completions=completions, **columns)

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets another process import the function itself."""
        return type(self), (self.function,)


def find_reward(name: str) -> Reward:
    """Import a function by its dotted name.

    Raises:
        ConfigError: As for `NamedReward`.
    """
    place, _, attribute = name.rpartition(".")
    if not place:
        raise RewardSettingError(f"reward {name!r} must be the dotted name of a function, such as my_rewards.short.")
    if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in (_OURS, *allowed())):
        raise RewardSettingError(
            f"reward {name!r}: module {place} is not allowed. Allow it with `lightning-lora --allow {place} ...`, or "
            f"{ALLOW_VARIABLE}={place} in the environment."
        )
    look_in_working_folder()
    try:
        module = importlib.import_module(place)
    except ImportError as error:
        raise RewardSettingError(f"reward {name!r}: module {place} cannot be imported: {error}.") from error
    found: Any = getattr(module, attribute, None)
    if not callable(found):
        hint = did_you_mean(attribute, [key for key, value in vars(module).items() if callable(value)])
        raise RewardSettingError(f"reward {name!r}: module {place} has no function {attribute}{hint}")
    return found  # pyright: ignore[reportReturnType]
