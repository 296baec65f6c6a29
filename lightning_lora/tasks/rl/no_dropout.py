"""Dropout off: a policy is compared with itself, token by token, and dropout would make it another one each time."""

from __future__ import annotations

from typing import Any


def without_dropout(config: Any) -> list[str]:
    """Set every dropout probability of a transformers config to 0, in place; returns the names of those that were not.

    Args:
        config: The config, before a model is built from it. Configs inside it are changed too.
    """
    names = []
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            names += [f"{name}.{inner}" for inner in without_dropout(value)]
        elif ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float) and value:
            setattr(config, name, 0.0)
            names.append(name)
    return names
