"""The tokens that end an answer: those at which a model stops, and the tokenizer whose template writes them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lora.data.chat.endings import end_of_turn_ids
from lightning_lora.data.chat.profile import end_of_answer_id, find_profile
from lightning_lora.data.chat.template import find_template
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.tokenizer import find_tokenizer
from lightning_lora.errors import ConfigError, TokenizerError


def tokenizer_of_data(data: Any, own: Any) -> Any | None:
    """The tokenizer and template with which a data module makes tokens; None if they are those of the model.

    Args:
        data: The data module of a run; None, or of an unknown kind, for other sources of batches.
        own: The LightningModule, whose tokenizer a data module takes if it was given none.
    """
    settings = getattr(data, "settings", None)
    if not isinstance(settings, RowSettings):
        return None
    given, chat_template = getattr(data, "tokenizer", None), settings.chat_template
    if given is None and chat_template is None:
        return None
    tokenizer = find_tokenizer(given, own)
    return tokenizer if chat_template is None else _with_template(tokenizer, find_template(tokenizer, chat_template))


def to_record(tokenizer: Any) -> dict[str, Any]:
    """What a checkpoint keeps of a tokenizer: where it lies, and its chat template."""
    template = tokenizer.chat_template
    return {
        "tokenizer": str(tokenizer.name_or_path or ""),
        "chat_template": dict(template) if isinstance(template, Mapping) else template,
    }


def from_record(record: Mapping[str, Any], own: Any) -> Any:
    """The tokenizer of a checkpoint; if it is gone, the model's own with the template of the checkpoint.

    Args:
        record: The result of `to_record`.
        own: The LightningModule, with the model's tokenizer.
    """
    name, tokenizer = record["tokenizer"], own.tokenizer
    if name and name != tokenizer.name_or_path:
        try:
            tokenizer = find_tokenizer(name, None)
        except ConfigError as error:
            rank_zero_warn(f"the tokenizer of the training is gone, that of the model takes its place: {error}")
    return _with_template(tokenizer, record["chat_template"])


def end_ids(tokenizer: Any) -> list[int]:
    """The tokens with which answers end under the tokenizer's own template; empty if it has no single default."""
    try:
        return end_of_turn_ids(tokenizer)
    except ConfigError:  # several templates and no default: whoever renders a row with it gets this error
        return []


def stopping_ids(generation_config: Any, ends: Iterable[int]) -> list[int]:
    """The tokens at which generation stops: those of the generation config first, then ``ends``."""
    known = getattr(generation_config, "eos_token_id", None)
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    if not all(isinstance(token, int) for token in known):
        raise TokenizerError(f"eos_token_id of the model's generation config must hold token ids, got {known!r}.")
    return list(dict.fromkeys([*known, *ends]))


def stop_ids(model: Any, tokenizer: Any, settings: RowSettings) -> list[int]:
    """Tokens at which an answer ends: those of the chat template, of the tokenizer, and of the model."""
    found = {*stopping_ids(model.generation_config, ()), tokenizer.eos_token_id, end_of_answer_id(tokenizer, settings)}
    for tools in (False, True):
        profile = find_profile(tokenizer, settings, tools)
        found.update(end_of_turn_ids(tokenizer, profile.template.text) if profile else ())
        found.update(tokenizer.convert_tokens_to_ids(list(profile.ends)) if profile else ())
    return sorted(found - {None})


def stop_at(model: Any, ids: list[int]) -> None:
    """Let generation stop at these tokens, here and in all that is written of the model."""
    config = getattr(model, "generation_config", None)
    if config is None or not ids or stopping_ids(config, ()) == ids:
        return
    # transformers writes a published config with contradictions as it is, and refuses one that was changed.
    as_published = getattr(config, "_original_object_hash", None) == hash(config)
    config.eos_token_id = ids
    if as_published:
        config._original_object_hash = hash(config)


def _with_template(tokenizer: Any, template: Any) -> Any:
    # A copy shares all but its attributes: the data module goes on choosing among the templates of the original.
    copied = copy.copy(tokenizer)
    copied.chat_template = template
    return copied
