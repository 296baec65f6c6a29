"""Keeping the libraries below us from filling the output of a command."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import datasets
from transformers.utils.logging import disable_progress_bar


def quiet_libraries() -> None:
    """No advertisements, no deprecations between libraries, and no progress bars in log files."""
    for handler in logging.getLogger("lightning.pytorch").handlers:
        handler.addFilter(lambda record: "💡" not in record.getMessage())
    # Said by every 8-bit layer in every batch of an evaluation.
    once_is_enough = logging.getLogger("bitsandbytes.autograd._functions")
    once_is_enough.addFilter(lambda record: "inputs will be cast" not in record.getMessage())
    # Lightning 2.6 asks torch 2.13 in a way that torch will drop; nobody here can act on it.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        disable_progress_bar()
        datasets.disable_progress_bars()
