"""A bound on what may take without end: a template or an expression that a stranger has written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


def has_time_limit() -> bool:
    """Whether this is the main thread of a system with such a timer, as Linux and macOS have it."""
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()


@contextmanager
def time_limit(seconds: float, stop: Callable[..., NoReturn]) -> Iterator[None]:
    """Call ``stop``, which raises, after so many seconds of computing of this process within the context.

    Nothing is stopped without `has_time_limit`.
    """
    is_timed = has_time_limit()
    before = signal.signal(signal.SIGPROF, stop) if is_timed else None
    try:
        if is_timed:
            signal.setitimer(signal.ITIMER_PROF, seconds)
        yield
    finally:
        if is_timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
