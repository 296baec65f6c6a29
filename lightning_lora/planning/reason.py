"""Why a value of a plan was chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """A value that a plan recommends, why, and who says so.

    Args:
        value: The setting and its value, such as ``rank 32``.
        why: One plain sentence.
        source: A paper, a page, or ``measured here``; ``convention`` where no source has evidence.
    """

    value: str
    why: str
    source: str
