"""How a run has made tokens of its rows, read from its ``config.yaml``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import ConfigError, GenerateError
from lightning_lora.files.yaml_text import read_yaml

FILE = "config.yaml"
_DEPTH = 3
"""Folders between the file of a run and the folder of the run, at most, and that folder itself."""
_KINDS = ("SFTDataModule", "PromptDataModule")
"""Data modules whose settings say how rows become tokens."""
_PLAIN = RowSettings(max_length=1024)


@dataclass(frozen=True)
class RunSettings:
    """What a run tells of its data.

    Args:
        rows: How rows became tokens.
        validation: The validation rows of the run; None if it had none, or is not known.
        tokenizer: The tokenizer if the run had another one than its model's.
        config: The file that was read; None if there is none.
    """

    rows: RowSettings = _PLAIN
    validation: str | list[str] | None = None
    tokenizer: str | None = None
    config: Path | None = None


def read_run_settings(path: Path) -> RunSettings:
    """Read the settings of the run that has written ``path``; defaults if none is found.

    Only plain values are read: nothing that the file names is imported.

    Raises:
        ConfigError: If the run's config is damaged, or holds settings that cannot be used.
    """
    for folder in [path, *path.absolute().parents][: _DEPTH + 1]:
        if (folder / FILE).is_file():
            return _read(folder / FILE)
    return RunSettings()


def _read(file: Path) -> RunSettings:
    try:
        config = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GenerateError(f"{file} cannot be read: {error}") from error
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict) or not str(data.get("class_path", _KINDS[0])).endswith(_KINDS):
        return RunSettings()
    given: dict[str, Any] = data.get("init_args") or {} if "class_path" in data else data
    names = {field.name for field in dataclasses.fields(RowSettings)}
    settings = {name: value for name, value in given.items() if name in names and value is not None}
    try:
        rows = dataclasses.replace(_PLAIN, **settings)
    except (ConfigError, TypeError) as error:
        raise GenerateError(f"{file}: the settings of the data cannot be used: {error}") from error
    return RunSettings(rows, given.get("validation"), given.get("tokenizer"), file)
