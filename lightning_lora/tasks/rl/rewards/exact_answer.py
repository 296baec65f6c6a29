"""A reward for the right final answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from lightning_lora.errors import RewardSettingError
from lightning_lora.tasks.rl.rewards.texts import text_of

GSM8K = r"####\s*(-?[$\d.,]+)"
"""The final answer of a row of GSM8K: ``#### 42``."""


class ExactAnswer:
    """Scores 1 where the final answer of a completion is that of the row, else 0.

    The final answer is what the first group of ``pattern`` finds last. Where both answers are numbers they are compared
    as such: ``1,000``, ``$1000`` and ``1000.0`` are equal. An answer of the row that the pattern does not find is
    compared as a whole, so that a column of ``72`` works as well as one of ``... #### 72``.

    Args:
        column: The column of the row that holds its answer.
        pattern: A regular expression with one group, by default that of GSM8K.

    Raises:
        ConfigError: If ``pattern`` is no regular expression with a group.
    """

    def __init__(self, column: str = "answer", pattern: str = GSM8K) -> None:
        self.column, self.pattern = column, compiled(pattern)
        if not self.pattern.groups:
            raise RewardSettingError(f"pattern {pattern!r} needs a group that holds the answer, such as '#### (.*)'.")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        """Rewards of rows.

        Raises:
            ConfigError: If the rows do not have the column.
        """
        if self.column not in columns:
            raise RewardSettingError(
                f"the rows have no column {self.column!r}; they have {', '.join(columns) or 'none'}."
            )
        rows = zip(completions, columns[self.column], strict=True)
        return [float(self._is_right(text_of(completion), str(wanted))) for completion, wanted in rows]

    def _is_right(self, completion: str, wanted: str) -> bool:
        found = self._final(completion)
        return found is not None and found == (self._final(wanted) or _plain(wanted))

    def _final(self, text: str) -> str | Decimal | None:
        matches = list(self.pattern.finditer(text))
        # A group that takes no part in its match has found nothing.
        return _plain(matches[-1].group(1)) if matches and matches[-1].group(1) is not None else None


def _plain(answer: str) -> str | Decimal:
    text = answer.strip().rstrip(".")
    try:
        number = Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return text
    return number if number.is_finite() else text


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression in which a dot stands for the end of a line too.

    Raises:
        ConfigError: If it is none.
    """
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RewardSettingError(f"{pattern!r} is no regular expression: {error}.") from error
