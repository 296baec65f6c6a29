"""A reward for the form of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_lora.tasks.rl.rewards.exact_answer import compiled
from lightning_lora.tasks.rl.rewards.texts import text_of


class Pattern:
    """Scores 1 where a regular expression is found in a completion, else 0.

    Args:
        pattern: The regular expression. ``^`` and ``$`` are the beginning and the end of the completion.
        whole: Whether it must match the whole completion.

    Raises:
        ConfigError: If ``pattern`` is no regular expression.
    """

    def __init__(self, pattern: str, whole: bool = False) -> None:
        self.pattern, self.whole = compiled(pattern), whole

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        """Rewards of rows."""
        found = self.pattern.fullmatch if self.whole else self.pattern.search
        return [float(found(text_of(completion)) is not None) for completion in completions]
