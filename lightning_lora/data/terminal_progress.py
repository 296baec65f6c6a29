"""Progress bars of ``datasets``, shown on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import datasets.config
from datasets.utils.tqdm import are_progress_bars_disabled


@contextmanager
def progress_on_terminals() -> Iterator[None]:
    """Hide progress bars if stderr is not a terminal, unless ``HF_DATASETS_DISABLE_PROGRESS_BARS`` is set."""
    decided = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None
    if decided or are_progress_bars_disabled() or sys.stderr.isatty():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
