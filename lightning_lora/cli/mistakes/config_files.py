"""Checks config files before they are parsed: what is wrong, in which file and line; and where a setting is given."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lora.cli.help.recipes import recipes
from lightning_lora.errors import CommandError, did_you_mean, first_five, first_line
from lightning_lora.files.yaml_text import MAX_CHARACTERS, compose_yaml

_OPTIONS = ("-c", "--config")
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


def check_config_files(arguments: Sequence[str]) -> None:
    """Read every config file on a command line.

    Raises:
        ConfigError: If one does not exist, is no YAML, holds no settings, gives a name twice, has settings of a class
            beside its ``init_args``, or a number that YAML reads otherwise than people do.

    Warns:
        UserWarning: If the callbacks of one replace those of another.
    """
    names = config_files(arguments)
    _check_recipes(names)
    roots = {name: _parsed(name) for name in names}
    for name, root in roots.items():
        for node in _nodes(root):
            if isinstance(node, yaml.MappingNode):
                _check_mapping(name, node)
    _tell_replaced_callbacks(roots)


def config_files(arguments: Sequence[str]) -> list[str]:
    """The names of the config files on a command line, in order."""
    names = []
    for place, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if option in _OPTIONS:
            names += [value] if equals else list(arguments[place + 1 : place + 2])
    return [name for name in names if not name.lstrip().startswith("{")]  # a config may be given as text


def place_of(key: str, arguments: Sequence[str]) -> str | None:
    """Where a setting is given: on the command line, or the file and line; None if nowhere.

    Args:
        key: Dotted name of the setting.
        arguments: The command line.
    """
    short = key.replace(".init_args", "")
    if any(word.partition("=")[0].removeprefix("--").replace(".init_args", "") == short for word in arguments):
        return "on the command line"
    for name in reversed(config_files(arguments)):
        line = _line_of(_parsed(name), key.split("."))
        if line is not None:
            return f"{name}, line {line}"
    return None


def _tell_replaced_callbacks(roots: Mapping[str, yaml.MappingNode]) -> None:
    before = ""
    for name, root in roots.items():
        if before and _line_of(root, ["trainer", "callbacks"]) is not None:
            rank_zero_warn(
                f"the callbacks of {name} replace those of {before}, which do not run: write 'callbacks+:' in {name} "
                "to add to them.",
                category=UserWarning,
            )
        if any(_line_of(root, ["trainer", key]) is not None for key in ("callbacks", "callbacks+")):
            before = name


def _parsed(name: str) -> yaml.MappingNode:
    text = _text(name)
    if text.startswith("Traceback (most recent call last)"):
        raise CommandError(
            f"config {name}, line 1: a traceback of Python, not settings; the command that wrote it failed with "
            f"{text.strip().splitlines()[-1]!r}."
        )
    try:
        root = compose_yaml(text)
    except yaml.MarkedYAMLError as error:
        raise CommandError(f"config {name}{_described(error, text)}") from error
    except yaml.reader.ReaderError as error:  # a character that no YAML may hold
        raise CommandError(f"config {name} is not YAML: {first_line(error)}.") from error
    except yaml.YAMLError as error:
        raise CommandError(f"config {name}: {error}.") from error
    if not isinstance(root, yaml.MappingNode):
        held = "is empty" if root is None else f"holds {_kind(root)}, not settings"
        raise CommandError(f"config {name} {held}: a config names settings, such as 'model:' or 'trainer:'.")
    return root


def _check_recipes(names: Sequence[str]) -> None:
    """Raise if a config that comes with the package is asked for where it is not."""
    missing = [name for name in names if not Path(name).exists()]
    of_package = recipes() if missing else {}
    recipe_of = {name: name.removeprefix("cli_configs/") for name in missing}
    if shipped := [recipe for name, recipe in recipe_of.items() if recipe in of_package and recipe != name]:
        raise CommandError(
            f"{first_five(missing)}: no such file in {os.getcwd()}. The package has these configs; put them there: "
            f"lightning-lora recipes copy {' '.join(shipped)}"
        )


def _text(name: str) -> str:
    path = Path(name)
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else Path()
        known = [str(folder / file.name) for kind in ("*.yaml", "*.yml", "*.json") for file in folder.glob(kind)]
        raise CommandError(f"config {name!r} does not exist (looked from {os.getcwd()}){did_you_mean(name, known)}")
    if not path.is_file():
        raise CommandError(f"config {name!r} is not a file but a folder; name a file in it, such as config.yaml.")
    try:
        if path.stat().st_size > 4 * MAX_CHARACTERS:
            raise CommandError(f"config {name} has {path.stat().st_size} bytes: settings need a few thousand.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"config {name} cannot be read as text ({error}); is it a config at all?") from error


def _described(error: yaml.MarkedYAMLError, text: str) -> str:
    """Line and content of the place where YAML stopped, and what is likely wrong there."""
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return f" is not YAML: {error.problem}."
    lines = text.splitlines()
    number = min(mark.line, len(lines) - 1)
    line = lines[number]
    where = f", line {number + 1}, {line.strip()!r}"
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return f"{where}: indented with a tab; YAML takes spaces only."
    return (
        f"{where}: {error.problem}. Is the line indented as its neighbours are? Settings of one group begin in the "
        "same column, two columns behind the name of the group."
    )


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.CollectionNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a group of settings"
    return f"the text {str(node.value)[:40]!r}"


def _nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    yield node
    if isinstance(node, yaml.CollectionNode):
        for value in node.value:
            yield from _nodes(value[1] if isinstance(value, tuple) else value)


def _check_mapping(name: str, mapping: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise CommandError(f"config {name}, line {line}: the name of a setting must be a text, not {_kind(key)}.")
        lines[key.value] = line
    stray = [key for key in lines if key not in _CLASS_KEYS]
    if stray and ("class_path" in lines or "init_args" in lines):
        raise CommandError(
            f"config {name}, line {lines[stray[0]]}: {first_five(map(repr, stray))} beside "
            f"{'class_path' if 'class_path' in lines else 'init_args'}; settings of a class go below its init_args, "
            "indented by two more columns."
        )


def _line_of(node: yaml.Node, names: list[str]) -> int | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    for key, value in node.value:
        if key.value == names[0]:
            return key.start_mark.line + 1 if len(names) == 1 else _line_of(value, names[1:])
    return None
