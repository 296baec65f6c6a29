"""A setting of a wrong type, found in the report of the parser, which tells what every member of a union expected."""

from __future__ import annotations

import re

from lightning_lora.errors import did_you_mean

_KEY = re.compile(r'Parser key "(.+?)":')
_CLASS = re.compile(r"Problem with given class_path '(.+?)'")
_WORDS = {
    "float": "a number, such as 0.0001 or 1e-4",
    "int": "a whole number, such as 4",
    "bool": "true or false",
    "str": "text",
    "dict": "names with values, such as {name: value}",
    "list": "a list, such as [first, second]",
    "NoneType": "null",
}


def wrong_value(report: str) -> tuple[str, str] | None:
    """Dotted name of the setting that has a wrong value, and a sentence about it; None if the report names none.

    Args:
        report: The error message of the parser.
    """
    key, rest = _innermost_key(report)
    if not key:
        return None
    found = re.search(r"Expected an? (\S.*?)\. Got value: (.*)", rest)
    if found:
        expected, given = _words(found.group(1)), found.group(2)
    else:
        subtypes = re.search(r"Subtypes: \[(.*)\]", rest)
        value = re.search(r"Given value: (.*)", rest)
        if subtypes is None or value is None:
            return None
        expected, given = _words(subtypes.group(1)), value.group(1)
    nested = re.fullmatch(r"NestedArg\(key='.*?', val='?(.*?)'?\)", given)
    given = nested.group(1) if nested else given
    shown = given if len(given) <= 60 else f"{given[:60]}..."
    return key, f"must be {expected}, got {shown!r}{did_you_mean(given, dict.fromkeys(_choices(rest)))}"


def last_class(report: str) -> str | None:
    """The innermost class that a report names by its path."""
    names = _CLASS.findall(report)
    return names[-1] if names else None


def _innermost_key(report: str) -> tuple[str, str]:
    """The dotted name of the innermost setting in a report, and the report from there on."""
    key, rest = "", report
    for match in _KEY.finditer(report):
        between = rest[: match.start() - (len(report) - len(rest))]
        inner = ".init_args." if _CLASS.search(between) else "."
        key = f"{key}{inner}{match.group(1)}" if key else match.group(1)
        rest = report[match.end() :]
    return key, rest


def _words(types: str) -> str:
    """Types as a user writes their values."""
    choices = dict.fromkeys(_choices(types))
    words = [f"one of {', '.join(choices)}"] if choices else []
    types = re.sub(r"\w*\.?Literal\[.*?\],? ?", "", types)
    for plain, generic in re.findall(r"<class '(.+?)'>|(\w[\w.]*(?:\[.*?\])?)", types):
        name = str(plain or generic.partition("[")[0]).rpartition(".")[2]
        words.append(_WORDS.get(name) or name)
    return " or ".join(dict.fromkeys(words))


def _choices(types: str) -> list[str]:
    """The values of all literals among types."""
    literals = re.findall(r"Literal\[(.*?)\]", types)
    return [choice.strip(" '") for literal in literals for choice in literal.split(",")]
