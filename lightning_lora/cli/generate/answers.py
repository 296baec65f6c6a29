"""Conversations to answers: the whole way, for the command and for Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_lora.cli.generate.decoding import Sampling, continue_tokens
from lightning_lora.data.prompts.prompt_tokens import prompt_ids
from lightning_lora.data.records import Conversation, Text
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import DataError
from lightning_lora.tasks.end_of_turn import stop_ids
from lightning_lora.tasks.loading import context_length
from lightning_lora.tasks.rl.sampling.stop_texts import StopTexts

if TYPE_CHECKING:  # the module imports torchao, bitsandbytes and peft
    from transformers import PreTrainedModel

END_OF_TURN, STOP_TEXT, MAX_NEW_TOKENS = "end of turn", "stop text", "max_new_tokens"
CONTEXT, INTERRUPTED = "context", "interrupted"


@dataclass(frozen=True)
class Answer:
    """What a model has written.

    Args:
        text: The answer without the token that ended it. Other special tokens are shown as they are written.
        stop: Why it ends: ``"end of turn"``, ``"stop text"``, ``"max_new_tokens"``, ``"context"`` (the model's context
            is full) or ``"interrupted"``.
        tokens: Number of tokens written, the one that ended the turn included.
    """

    text: str
    stop: str
    tokens: int


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation | Text],
    settings: RowSettings | None = None,
    sampling: Sampling | None = None,
    on_tokens: Callable[[Tensor], bool] | None = None,
) -> list[Answer]:
    """Answer conversations, or continue texts, in order.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer.
        conversations: Conversations up to the answer that is asked for, and texts.
        settings: How conversations become tokens; those of the training. None takes the tokenizer's chat template.
        sampling: How tokens are chosen. None is greedy.
        on_tokens: Called with each token of a single answer as it comes, ``(1,)``; if it returns True, the answer ends.

    Raises:
        DataError: If a conversation cannot be rendered, or is longer than the context of the model.
    """
    settings = settings or RowSettings(max_length=1024)
    prompts = encode_prompts(model, tokenizer, conversations, settings)
    return answer_tokens(model, tokenizer, prompts, settings, sampling or Sampling(), on_tokens)


def encode_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation | Text],
    settings: RowSettings,
) -> list[list[int]]:
    """Token ids of all prompts.

    Raises:
        DataError: If a conversation cannot be rendered, leaves no room for an answer in the context of the model, or
            holds a token that the model does not know.
    """
    prompts = prompt_ids(tokenizer, conversations, settings)
    table: Any = model.get_input_embeddings()
    limit, num_known = context_length(model.config), table.weight.shape[0]
    for conversation, ids in zip(conversations, prompts, strict=True):
        if not ids:
            raise DataError(f"{conversation.place}: the prompt has no tokens.")
        if max(ids) >= num_known:
            raise DataError(
                f"{conversation.place}: token {max(ids)} is beyond the {num_known} that the model knows: its tokenizer "
                "is that of another model."
            )
        if limit is not None and len(ids) >= limit:
            raise DataError(
                f"{conversation.place}: the prompt has {len(ids)} tokens, and the context of the model is {limit}: "
                "shorten it."
            )
    return prompts


def answer_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: RowSettings,
    sampling: Sampling,
    on_tokens: Callable[[Tensor], bool] | None = None,
) -> list[Answer]:
    """Answers to prompts that `encode_prompts` has made; the other arguments are those of `generate`."""
    stops, limit = stop_ids(model, tokenizer, settings), context_length(model.config)
    texts = StopTexts(tokenizer, sampling.stop) if sampling.stop else None
    found = continue_tokens(model, prompts, sampling, stops, texts, on_tokens)
    reasons = [
        (END_OF_TURN if ids[-1] in stops else STOP_TEXT)
        if finished
        else _why_not_ended(len(prompt), len(ids), sampling.max_new_tokens, limit)
        for prompt, (ids, finished) in zip(prompts, found, strict=True)
    ]
    return [
        Answer(_text(tokenizer, ids[:-1] if reason == END_OF_TURN else ids), reason, len(ids))
        for (ids, _), reason in zip(found, reasons, strict=True)
    ]


def _why_not_ended(before: int, written: int, most: int, limit: int | None) -> str:
    if written >= most:
        return MAX_NEW_TOKENS
    return CONTEXT if limit is not None and before + written >= limit else INTERRUPTED


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
