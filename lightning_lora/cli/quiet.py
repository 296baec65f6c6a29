"""Keeps the libraries below us from filling the output of a command."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from dataclasses import dataclass

# Logger and words of each message that is left out; nobody who trains a model can act on any of them.
_NOISE = (
    ("lightning.pytorch.utilities.rank_zero", "💡"),
    # Kernels for other GPUs than this machine has; torchao works without them.
    ("torchao", "Failed to load"),
    ("torch.utils._pytree", "is an Enum subclass"),
    ("bitsandbytes.backends.cpu.ops", "from kernels-community"),
    # Every 8-bit layer says it in every batch of an evaluation.
    ("bitsandbytes.autograd._functions", "inputs will be cast"),
)


def quiet_libraries() -> None:
    """Leave out advertisements, notes of one library to another, and progress bars in log files.

    Nothing is imported for it: it works for libraries that are imported later. A second call changes nothing.
    """
    for logger, words in _NOISE:
        logging.getLogger(logger).addFilter(_LeaveOut(words))
    # Lightning 2.6 asks torch 2.13 in a way that torch will drop.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated")
    # Lightning 2.6 says at every start without TensorBoard what it takes instead.
    warnings.filterwarnings("ignore", message="Starting from v1.9.0, `tensorboardX` has been removed")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        # transformers reads the variable when it is imported, here and in the processes that a strategy starts.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if "transformers" in sys.modules:
            sys.modules["transformers"].utils.logging.disable_progress_bar()


def tell_infos(shown: bool) -> None:
    """Show, or leave out, what Lightning and we say of the Trainer and the data. Warnings are always shown."""
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.INFO if shown else logging.WARNING)


@dataclass(frozen=True)
class _LeaveOut:
    """A logging filter; equal ones are added to a logger once."""

    words: str

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()
