"""Signals that end a plan at once: there is nothing to save."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_GRACE = 3.0
"""Seconds for cleaning up: an exception that a signal raises inside a finalizer is lost."""
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@contextmanager
def ending_at_once(doing: str | None = None) -> Iterator[None]:
    """Within the context SIGTERM ends the process at once, with exit code 143, as it does without a Trainer.

    A Trainer puts an answer of its own in place of the default, which may wait for the end of a run. But it calls the
    answer that it finds, so one is put there. An answer of somebody else stays.

    Args:
        doing: What is ended, for one line on the way out; with it, Ctrl-C too ends the process so, with exit code 130.
    """

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one does not ask
        if doing is not None:
            print(f"\n{doing} was ended by {_NAMES[signal.Signals(number)]}; nothing is written.", file=sys.stderr)
            timer = threading.Timer(_GRACE, os._exit, (128 + number,))
            timer.daemon = True
            timer.start()
        raise SystemExit(128 + number)

    defaults: dict[signal.Signals, Any] = {signal.SIGTERM: signal.SIG_DFL}
    if doing is not None:
        defaults[signal.SIGINT] = signal.default_int_handler
    if threading.current_thread() is threading.main_thread():
        ours = [number for number, default in defaults.items() if signal.getsignal(number) == default]
    else:
        ours = []
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, defaults[number])
