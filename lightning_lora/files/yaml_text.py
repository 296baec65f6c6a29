"""YAML that somebody else may have written: composed and read within bounds, and nothing that it names is imported.

The library itself writes out every alias that it meets, and 300 bytes can so become more values than a machine holds;
a file that is nested too deeply ends in a ``RecursionError``. Here both are errors of the text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_CHARACTERS = 2**20
MAX_VALUES = 100_000
_PLAIN_TAG = re.compile(r"tag:yaml\.org,2002:\w+")


def compose_yaml(text: str) -> yaml.Node | None:
    """The nodes of one YAML document; None if it is empty.

    Raises:
        yaml.YAMLError: If it is no YAML, longer than `MAX_CHARACTERS`, nested too deeply, holds more than `MAX_VALUES`
            values with every alias written out, has an alias inside of what it stands for, a key twice, a tag such
            as ``!!python/object``, or a number that YAML 1.1 reads otherwise than people do.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text)} characters, more than the {MAX_CHARACTERS} that settings need")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    if root is not None and (count := _count(root, {})) > MAX_VALUES:
        raise yaml.YAMLError(f"it holds {count} values with its aliases written out, more than {MAX_VALUES}")
    return root


def read_yaml(text: str) -> Any:
    """The value of one YAML document, of plain types only.

    Raises:
        yaml.YAMLError: As for `compose_yaml`.
    """
    root = compose_yaml(text)
    try:
        return None if root is None else yaml.SafeLoader("").construct_document(root)
    except ValueError as error:  # such as the 30th of February
        raise yaml.YAMLError(str(error)) from error


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """The number of values in a node; 0 in ``counts`` stands for a node that is being counted."""
    if (known := counts.get(id(node))) is not None:
        if not known:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1} has an alias inside of what it stands for")
        return known
    _check(node)
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    counts[id(node)] = 0
    inside = node.value if isinstance(node, yaml.CollectionNode) else ()
    parts = (part for item in inside for part in (item if isinstance(item, tuple) else (item,)))
    counts[id(node)] = 1 + sum(_count(part, counts) for part in parts)
    return counts[id(node)]


def _check(node: yaml.Node) -> None:
    place = f"line {node.start_mark.line + 1}"
    if not _PLAIN_TAG.fullmatch(node.tag):
        raise yaml.YAMLError(f"{place} has the tag {node.tag!r}: settings are plain values without a tag")
    if node.tag == "tag:yaml.org,2002:int" and re.fullmatch(r"[+-]?(0\d+|.*:.*)", node.value):
        what = "counts in sixties" if ":" in node.value else "is octal"
        raise yaml.YAMLError(
            f"{place}: {node.value} {what} to YAML; write the number without a colon or a zero in front, or a text as "
            f"'{node.value}'"
        )


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        if key.value in lines and key.value != "<<":
            raise yaml.YAMLError(
                f"{key.value!r} is given twice in one group, in lines {lines[key.value]} and {line}; YAML would forget "
                f"the first"
            )
        lines[key.value] = line
