"""Values in PEFT's ``adapter_config.json`` that cannot be used: of a wrong type, or expressions that do not end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lightning_lora.errors import AdapterFileError, AdapterFolderError, ConfigError
from lightning_lora.files.adapter.peft_format import CONFIG_FILE
from lightning_lora.time_limit import time_limit

_SECONDS = 1.0
"""Of computing for all names and expressions of a folder; those of a thousand layers take hundredths of it."""
_KINDS: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "fan_in_fan_out": (bool,),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "target_modules": (str, list),
    "modules_to_save": (list,),
}
"""What the entries hold that decide what an adapter computes; null is the default of each."""


def check_kinds(peft: Mapping[str, Any], where: str) -> None:
    """Refuse values of a wrong type.

    Args:
        peft: Contents of ``adapter_config.json``.
        where: Its place, for the message.

    Raises:
        AdapterFileError: Naming the entry.
    """
    for key, kinds in _KINDS.items():
        value = peft.get(key)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise AdapterFolderError(f"{where}: {key} must be {names}, got {value!r}.")


@contextmanager
def usable_settings(folder: Path) -> Iterator[None]:
    """Raise `AdapterFileError` for any error about values in the settings, within the context."""

    def stop(*_: object) -> NoReturn:
        raise AdapterFolderError(
            f"{folder / CONFIG_FILE} holds a regular expression that has not ended after {_SECONDS:.0f} s: look at "
            "target_modules, rank_pattern and alpha_pattern."
        )

    try:
        with time_limit(_SECONDS, stop):
            yield
    except AdapterFileError:
        raise
    except (ConfigError, ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise AdapterFolderError(f"{folder} holds settings that cannot be used: {error}") from error
