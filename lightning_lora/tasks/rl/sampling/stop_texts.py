"""Texts that end a completion, found in the tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What stands for a character of which some bytes are missing."""


class StopTexts:
    """Finds the rows whose last token completes a stop text.

    Args:
        tokenizer: The tokenizer of the model.
        texts: Texts that end a completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, tuple(texts)
        self._last = {text[-1] for text in texts}
        # A token of a text holds at least one byte; one more may hold what comes before.
        self._tail = max(len(text.encode()) for text in texts) + 1
        self._may_complete: dict[int, bool] = {}

    def completed(self, tokens: Tensor, rows: Sequence[int], step: int) -> list[bool]:
        """Whether each row is ended by its newest token.

        Args:
            tokens: New tokens of all rows so far, ``(all rows, width)``.
            rows: The rows to look at.
            step: Column of the newest token.
        """
        newest = tokens[:, step].tolist()
        return [self._may(newest[row]) and self._ends(tokens[row, : step + 1]) for row in rows]

    def _may(self, token: int) -> bool:
        """Whether a token holds the last character of a stop text, or a part of some character."""
        known = self._may_complete.get(token)
        if known is None:
            text = self._decoded([token])
            known = self._may_complete[token] = _UNFINISHED in text or bool(self._last.intersection(text))
        return known

    def _ends(self, tokens: Tensor) -> bool:
        text = self._decoded(tokens[-self._tail :].tolist())
        return any(stop in text for stop in self.texts)

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
