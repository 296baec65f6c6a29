"""Sampled completions as rows of tokens, and as the texts that a reward reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import DataError, GuardError
from lightning_lora.tasks.rl.sampling.samples import Samples


def rows_of(prompts: Sequence[Tensor], samples: Samples, group_size: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Put prompts and completions together, padded on the right.

    Returns:
        ``input_ids`` and ``mask``, 1 where the next token is trained, each ``(rows, tokens)``; the log-probabilities of
        the sampler at the same places, ``(rows, tokens)`` float32; and the tokens of each row, ``(rows,)``.
    """
    device = samples.tokens.device
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(group_size)
    lengths = starts + samples.lengths
    shape = len(lengths), int(lengths.max())
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    logprobs = torch.zeros(shape, device=device)
    mask = torch.zeros(shape, dtype=torch.long, device=device)
    for row, (start, end) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        ids[row, :start] = prompts[row // group_size]
        ids[row, start:end] = samples.tokens[row, : end - start]
        # By lengths, never by ids: the end of a turn may be the padding token, and is trained.
        mask[row, start - 1 : end - 1] = 1
        logprobs[row, start - 1 : end - 1] = samples.logprobs[row, : end - start]
    return {"input_ids": ids, "mask": mask}, logprobs, lengths


def texts_of(samples: Samples, prompts: Sequence[Any], group_size: int, tokenizer: Any) -> list[Any]:
    """The completions as a reward reads them: text, or a message of the assistant where the prompt is messages."""
    rows = [tokens[:length] for tokens, length in zip(samples.tokens.tolist(), samples.lengths.tolist(), strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [
        text if isinstance(prompts[row // group_size], str) else [{"role": "assistant", "content": text}]
        for row, text in enumerate(texts)
    ]


def check_prompts(prompts: Sequence[Tensor], max_new_tokens: int, context: int | None) -> None:
    """Refuse prompts that are empty or leave no room for a completion.

    Raises:
        DataError: With the number of the prompt in its batch, and its length.
    """
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {number} of a batch has no tokens: a completion needs one to follow.")
        if context is not None and len(prompt) + max_new_tokens > context:
            raise DataError(
                f"prompt {number} of a batch has {len(prompt)} tokens, which leave no room for {max_new_tokens} new "
                f"ones in the model's context of {context}: leave out such prompts, or lower max_new_tokens."
            )


def check_samples(samples: Samples, num_rows: int, version: int) -> None:
    """Refuse completions that cannot be trained on.

    Raises:
        GuardError: If they are those of other weights than the present ones.
        DataError: If a completion is missing, or has no token.
    """
    if samples.version != version:
        raise GuardError(
            f"the sampler drew with weights of step {samples.version} and the policy is at step {version}: its load() "
            "must take the weights that it is given."
        )
    if len(samples.lengths) != num_rows:
        raise DataError(f"the sampler returned {len(samples.lengths)} completions where {num_rows} were asked for.")
    if not samples.lengths.all():
        empty = int((samples.lengths == 0).sum())
        raise DataError(
            f"{empty} of {num_rows} completions have no token, not even one that ends the turn: the sampler must draw "
            "at least one."
        )
