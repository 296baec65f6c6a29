"""The YAML of a plan: what ``fit`` runs, each value with its reason and source as a comment."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from lightning_lora.checkpoints.contents import NotGiven
from lightning_lora.files.atomic import write_text
from lightning_lora.planning.reason import Reason

GIVEN = "as given"
_WIDTH = 118


def write_config(path: str | Path, config: Mapping[str, Any], reasons: Mapping[str, Reason], heading: str = "") -> Path:
    """Write settings as YAML. A comment above a value says why it was chosen and who says so.

    Args:
        path: The file to write; it appears whole or not at all.
        config: Nested settings of ``fit``.
        reasons: Why, by dotted name. A name's reason counts for everything below it; all others are as given.
        heading: Comment at the top.
    """
    path = Path(path)
    lines = [*_comment(heading, 0), *_lines(config, reasons, "", 0)]
    write_text(path, "\n".join(lines) + "\n")
    return path


@functools.cache
def taken_arguments(kind: type) -> dict[str, Any]:
    """The arguments that a config may give a class, with their defaults: those that it passes on to its bases too."""
    parser = ArgumentParser(exit_on_error=False)
    prefix = "object"
    parser.add_class_arguments(kind, prefix, fail_untyped=False, sub_configs=True)
    defaults = parser.get_defaults(skip_validation=True)
    return {name: value for name, value in vars(defaults.get(prefix, Namespace())).items()}


def class_settings(kind: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A class and those of its arguments that differ from the defaults, as a config names them."""
    settings: dict[str, Any] = {"class_path": f"{_public_module(kind)}.{kind.__qualname__}"}
    if init := without_defaults(kind, arguments):
        settings["init_args"] = init
    return settings


def without_defaults(kind: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that differ from the defaults of a class."""
    known = inspect.signature(kind).parameters
    kept = {}
    for name, value in arguments.items():
        default = known[name].default if name in known else inspect.Parameter.empty
        if default != value and not (default is None and value in ({}, [], ())):
            kept[name] = plain(value)
    return kept


def without_class_defaults(settings: Any) -> Any:
    """The settings of a class in a config, without arguments that equal their defaults."""
    if not isinstance(settings, Mapping) or "class_path" not in settings:
        return settings
    module, _, name = settings["class_path"].rpartition(".")
    defaults = taken_arguments(getattr(import_module(module), name))
    given = settings.get("init_args") or {}
    kept = {each: value for each, value in given.items() if each not in defaults or value != plain(defaults[each])}
    return {"class_path": settings["class_path"], "init_args": kept}


def plain(value: Any) -> Any:
    """A setting as mappings, lists, strings and numbers."""
    if hasattr(value, "as_dict"):  # a Namespace of jsonargparse
        value = value.as_dict()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items() if not isinstance(each, NotGiven)}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _public_module(kind: type) -> str:
    """The shortest module that exports the class."""
    parts = kind.__module__.split(".")
    for end in range(1, len(parts)):
        if getattr(import_module(".".join(parts[:end])), kind.__name__, None) is kind:
            return ".".join(parts[:end])
    return kind.__module__


def _lines(config: Mapping[str, Any], reasons: Mapping[str, Reason], above: str, depth: int) -> Iterator[str]:
    for name, value in config.items():
        path = f"{above}.{name}" if above else name
        yield from _reason(reasons, path, depth)
        indent = "  " * depth
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, reasons, path, depth + 1)
        elif isinstance(value, list) and any(isinstance(item, Mapping) and item for item in value):
            yield f"{indent}{name}:"
            yield from _items(value, reasons, path, depth + 1)
        else:
            yield f"{indent}{name}: {_scalar(value)}" + ("" if _is_told(reasons, path) else f"  # {GIVEN}")


def _items(values: list[Any], reasons: Mapping[str, Reason], above: str, depth: int) -> Iterator[str]:
    """The lines of a list; a mapping in it begins on the line of its dash."""
    indent = "  " * depth
    for number, value in enumerate(values):
        path = f"{above}.{number}"
        yield from _reason(reasons, path, depth)
        if isinstance(value, Mapping) and value:
            first, *rest = _lines(value, reasons, path, depth + 1)
            yield f"{indent}- {first.strip()}"
            yield from rest
        else:
            yield f"{indent}- {_scalar(value)}" + ("" if _is_told(reasons, path) else f"  # {GIVEN}")


def _reason(reasons: Mapping[str, Reason], path: str, depth: int) -> list[str]:
    reason = reasons.get(path)
    return [] if reason is None else _comment(f"{reason.value}: {reason.why} ({reason.source}).", depth)


def _is_told(reasons: Mapping[str, Reason], path: str) -> bool:
    return any(path == each or path.startswith(f"{each}.") for each in reasons)


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _comment(text: str, depth: int) -> list[str]:
    start = "  " * depth + "# "
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, _WIDTH - len(start))]
    return [start + line for line in lines]
