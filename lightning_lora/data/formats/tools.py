"""Calls of tools and their definitions, in the shape that chat templates read: OpenAI's, with arguments as objects."""

from __future__ import annotations

from typing import Any

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.formats.values import parsed, short, structure


def read_calls(value: Any, name: str, place: str) -> list[dict[str, Any]]:
    """The calls of a message, each as ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``.

    A call may be given as JSON text, or without the outer object. Arguments that are the JSON text of an object, as
    OpenAI stores them, become the object, since templates write them as JSON themselves.

    Raises:
        RowError: If it is not a list of calls, or a call has no name.
    """
    return [_call(call, name, place) for call in _objects(value, name, place)]


def read_tools(value: Any, name: str, place: str) -> list[dict[str, Any]]:
    """The definitions of tools, each as ``{"type": "function", "function": {...}}``.

    Raises:
        RowError: If it is not a list of definitions.
    """
    return [_definition(tool) for tool in _objects(value, name, place)]


def _objects(value: Any, name: str, place: str) -> list[dict[str, Any]]:
    found = structure(value, name, place)
    found = [found] if isinstance(found, dict) else found
    found = [structure(item, name, place) for item in found] if isinstance(found, list) else found
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        kind = f"{name!r} must be a list of objects, or its JSON text"
        raise RowError(place, kind, f", got {short(value)}.")
    return found


def _call(call: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, dict):
        outer = {key: value for key, value in call.items() if key != "function"}
    else:
        outer = {key: call[key] for key in ("id", "type") if key in call}
        inner = {key: value for key, value in call.items() if key not in outer}
    if not isinstance(inner.get("name"), str) or not inner["name"].strip():
        raise RowError(place, f"a call in {name!r} has no 'name'", f": {short(call)}.")
    given = inner.get("arguments", inner.get("parameters", {}))
    arguments = {} if given == "" else structure(given, name, place)
    rest = {key: value for key, value in inner.items() if key not in ("arguments", "parameters")}
    return {"type": "function", **outer, "function": {**rest, "arguments": arguments}}


def _definition(tool: dict[str, Any]) -> dict[str, Any]:
    if isinstance(tool.get("function"), dict):
        inner, outer = tool["function"], tool
    elif isinstance(tool.get("name"), str):
        inner, outer = {key: value for key, value in tool.items() if key != "type"}, {}
    else:  # a tool that is no function, such as a built-in one
        return tool
    if "parameters" in inner:
        inner = {**inner, "parameters": parsed(inner["parameters"])}
    return {"type": "function", **outer, "function": inner}
