"""The tokens that end an answer under the chat template in a folder."""

from __future__ import annotations

import warnings
from pathlib import Path

from lightning_lora.errors import ConfigError
from lightning_lora.files.adapter.peft_format import CONFIG_FILE
from lightning_lora.files.generation_config import GENERATION_FILE
from lightning_lora.files.json_object import read_json


def end_tokens(adapter: Path, base: Path | None) -> list[int]:
    """Ids of the tokens that end the answers of an adapter, by the tokenizer beside it or else that of its base.

    Empty if the adapter's folder has a generation config, which says it, or if there is no chat template. Then no
    tokenizer is loaded, which takes seconds.

    Args:
        adapter: The adapter's folder.
        base: The folder of its base; None if it is not on this machine.
    """
    if (adapter / GENERATION_FILE).is_file() or not (adapter / CONFIG_FILE).is_file():
        return []
    if read_json(adapter / CONFIG_FILE).get("task_type") == "SEQ_CLS":
        return []
    places = [place for place in (adapter, base) if place is not None and (place / "tokenizer_config.json").is_file()]
    folder = next(iter(places), None)
    if folder is None or not _has_template(folder):
        return []
    from lightning_lora.data.chat.endings import end_of_turn_ids
    from lightning_lora.data.tokenizer import find_tokenizer

    try:
        return end_of_turn_ids(find_tokenizer(str(folder.absolute()), None))
    except ConfigError as error:  # the weights are the same without it
        warnings.warn(f"the token that ends an answer is not known, and not added: {error}", stacklevel=2)
        return []


def _has_template(folder: Path) -> bool:
    stored = any((folder / name).exists() for name in ("chat_template.jinja", "additional_chat_templates"))
    return stored or bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
