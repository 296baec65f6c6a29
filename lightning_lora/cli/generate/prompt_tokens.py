"""Prompts to token ids, as in training; and the tokens at which an answer ends."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.chat.endings import end_of_turn_ids
from lightning_lora.data.chat.template import Template, find_template
from lightning_lora.data.records import Conversation, Text
from lightning_lora.data.settings import RowSettings

if TYPE_CHECKING:  # the module imports torchao, bitsandbytes and peft
    from transformers import PreTrainedModel


def prompt_ids(tokenizer: PreTrainedTokenizerBase, record: Conversation | Text, settings: RowSettings) -> list[int]:
    """Token ids of a conversation up to its next answer, or of a text to be continued.

    Without a chat template, a single question is followed by ``settings.prompt_separator``.

    Raises:
        RowError: If the chat template refuses the conversation, or there is none and it has several turns.
        ConfigError: If the chat template of the settings cannot be found.
    """
    if isinstance(record, Text):
        return [*_start_ids(tokenizer), *_ids(tokenizer, record.text)]
    template = find_template(tokenizer, settings.chat_template, bool(record.variables.get("tools")))
    if template is not None:
        # The template writes the begin token itself, where there is one.
        return _ids(tokenizer, _rendered(tokenizer, template, record, settings))
    roles = [message["role"] for message in record.messages]
    if roles != ["user"]:
        raise RowError(
            record.place,
            f"the tokenizer has no chat template, and the turns {roles} need one (only a single question does not). "
            "Give one with --chat_template.",
        )
    return [*_start_ids(tokenizer), *_ids(tokenizer, record.messages[0]["content"] + settings.prompt_separator)]


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: RowSettings) -> list[int]:
    """Tokens at which an answer ends: those of the chat template, of the tokenizer, and of the model."""
    of_model: Any = getattr(model.generation_config, "eos_token_id", None)
    of_model = of_model if isinstance(of_model, list) else [of_model]
    templates = {find_template(tokenizer, settings.chat_template, tools) for tools in (False, True)}
    of_templates = [token for template in templates for token in end_of_turn_ids(tokenizer, template)]
    own = tokenizer.convert_tokens_to_ids(settings.end_of_answer) if settings.end_of_answer else None
    return sorted({*of_templates, tokenizer.eos_token_id, own, *of_model} - {None})


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str, record: Conversation, settings: RowSettings) -> str:
    variables = {**settings.chat_template_kwargs, **record.variables}
    variables |= variables.pop("chat_template_kwargs", None) or {}
    day = variables.pop("date", None)
    today = date.fromisoformat(str(day)) if day else date.today()
    try:
        return Template(template, tokenizer.special_tokens_map, today).render(record.messages, prompt=True, **variables)
    except (TemplateError, TypeError, ValueError) as error:
        raise RowError(record.place, "the chat template refuses this conversation: ", str(error)) from error


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, padding=False, truncation=False, verbose=False)["input_ids"]  # type: ignore[return-value]


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    first = tokenizer("a", padding=False, truncation=False, verbose=False)["input_ids"][0]  # type: ignore[index]
    return [first] if first == tokenizer.bos_token_id else []
