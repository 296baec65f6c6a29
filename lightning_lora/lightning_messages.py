"""What Lightning and this package tell of a Trainer and a module, left out for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Our own messages go through the first; a level set for it alone would go before those of its parents.
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch",
    "lightning.fabric",
    "lightning",
)


@contextmanager
def messages_from(level: int) -> Iterator[None]:
    """Leave out messages below ``level``, such as `logging.WARNING`, until the block ends."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
