"""``lightning-lora schema``: what a config may hold, as a JSON schema, for editors that complete and check YAML.

Our tasks, data modules and callbacks, the LoRA settings and the Trainer are described in full: an unknown key is a
mistake. Classes of others may hold anything. A file may be a part of a config, so that nothing is required.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import ModuleType
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_lora import callbacks, data, tasks

Schema = dict[str, Any]
# Each of these has dozens of classes of Lightning, or is an object of any class.
_ANY = ("accelerator", "callbacks", "logger", "plugins", "profiler", "strategy")


def config_schema() -> Schema:
    """The schema (JSON Schema 2020-12) of the configs of ``fit``, ``probe`` and their like."""
    shared: Schema = {}
    trainer = _settings(Trainer, shared, skip=set(_ANY))
    listed = {"type": "array", "items": _object_of(callbacks, Callback, shared)}
    trainer["properties"] |= {name: {} for name in _ANY} | {"callbacks": listed, "callbacks+": listed}
    properties = {
        "seed_everything": {"type": ["integer", "boolean"], "description": "Seed of adapters, data order and dropout."},
        "model": _object_of(tasks, LightningModule, shared),
        "data": _object_of(data, LightningDataModule, shared),
        "trainer": trainer,
        "target_batch_size": {
            "type": ["integer", "null"],
            "description": "Rows of an optimizer step on all devices; the accumulation follows.",
        },
        "allow_other_base": {
            "type": "boolean",
            "description": "Load a checkpoint even if its adapter was trained on other base weights.",
        },
        "ckpt_path": {"type": ["string", "null"], "description": "A checkpoint to go on from."},
        "weights_only": {"type": ["boolean", "null"], "description": "Load the checkpoint without unpickling."},
    }
    title = "A config of lightning-lora fit"
    root = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, "type": "object"}
    return root | {"properties": properties, "$defs": shared}


def _object_of(room: ModuleType, base: type, shared: Schema) -> Schema:
    """An object by ``class_path`` and ``init_args``; those of the classes of a room are described."""
    classes = dict(_classes(room, base))
    described = [
        {
            "if": {"properties": {"class_path": {"const": path}}, "required": ["class_path"]},
            "then": {"properties": {"init_args": _settings(kind, shared)}},
        }
        for path, kind in classes.items()
    ]
    named = {"anyOf": [{"enum": list(classes)}, {"type": "string"}]}
    return {
        "type": ["object", "string"],
        "properties": {"class_path": named, "init_args": {"type": "object"}, "dict_kwargs": {"type": "object"}},
        "allOf": described,
    }


def _classes(room: ModuleType, base: type) -> Iterator[tuple[str, type]]:
    for name in room.__all__:
        kind = getattr(room, name)
        if isinstance(kind, type) and issubclass(kind, base):
            yield f"{room.__name__}.{name}", kind


def _settings(kind: type, shared: Schema, skip: set[str | int] | None = None) -> Schema:
    """The arguments of a class; the types that several share go into ``shared``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=False, skip=skip)
    found = json.loads(parser.get_completion_script("jsonschema"))
    for name in _callables(kind):
        # The parser knows the name of a function only; an object that can be called is one of any class.
        found["properties"][name]["type"] = ["string", "object", "null"]
    definitions = found.pop("$defs", {})
    for definition in definitions.values():
        _relax(definition)
    shared |= definitions
    return _relax(found)


def _callables(kind: type) -> list[str]:
    """The arguments of a class that are functions."""
    return [name for name, hint in get_type_hints(kind.__init__).items() if "Callable[" in str(hint)]


def _relax(schema: Schema) -> Schema:
    """Without what holds for a whole file only: its ``$schema``, and that every setting is there."""
    schema.pop("$schema", None)
    schema.pop("required", None)
    schema.get("properties", {}).pop("$schema", None)
    return schema
