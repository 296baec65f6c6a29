"""A bound on what may take without end: a template or an expression that a stranger has written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def time_limit(seconds: float, stop: Callable[..., NoReturn]) -> Iterator[None]:
    """Call ``stop``, which raises, after so many seconds of computing of this process within the context.

    Only the main thread of a system with such a timer is stopped.
    """
    is_timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGPROF, stop) if is_timed else None
    try:
        if is_timed:
            signal.setitimer(signal.ITIMER_PROF, seconds)
        yield
    finally:
        if is_timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
