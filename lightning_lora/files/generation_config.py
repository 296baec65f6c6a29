"""``generation_config.json`` of a model folder: the tokens at which transformers and vLLM stop."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_lora.errors import AdapterFolderError
from lightning_lora.files.json_object import read_json

GENERATION_FILE = "generation_config.json"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def stops_of(folder: Path) -> list[int]:
    """The tokens at which the model in ``folder`` stops, from its generation config or else its config.

    Raises:
        AdapterFileError: If the file is damaged.
    """
    return _ids(_settings(folder), folder)


def add_stops(folder: Path, tokens: Iterable[int]) -> None:
    """Let the model in ``folder`` stop at ``tokens`` too; nothing is written if it does already.

    Raises:
        AdapterFileError: If the generation config that is there is damaged.
    """
    settings = _settings(folder)
    known = _ids(settings, folder)
    wanted = list(dict.fromkeys([*known, *tokens]))
    if wanted != known:
        settings["eos_token_id"] = wanted
        (folder / GENERATION_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def _ids(settings: dict[str, Any], folder: Path) -> list[int]:
    found = settings.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise AdapterFolderError(f"eos_token_id of the model in {folder} is no token id nor a list of them: {found!r}.")
    return ids


def _settings(folder: Path) -> dict[str, Any]:
    if (folder / GENERATION_FILE).is_file():
        return read_json(folder / GENERATION_FILE)
    if not (folder / "config.json").is_file():
        return {}
    # transformers makes a generation config of the config where there is none. It reads a part of the config for those
    # models that have several.
    config = read_json(folder / "config.json")
    parts = [config, *(config[part] for part in ("decoder", "text_config") if isinstance(config.get(part), dict))]
    found = {name: next((p[name] for p in parts if p.get(name) is not None), None) for name in _SPECIAL}
    return {name: value for name, value in found.items() if value is not None}
