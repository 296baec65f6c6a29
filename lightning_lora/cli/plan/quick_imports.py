"""Imports of large libraries in less time, for a command that shall answer at once."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_SIGNAL = "scipy.signal"


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without what only takes time: a quarter of it.

    Nobody looks for garbage, for imports make none; and what is imported is left out of later searches, for it stays
    until the process ends. ``scipy.signal``, which torchmetrics imports to give it a name of old, waits until it is
    used.
    """
    if "torchmetrics" not in sys.modules and find_spec("scipy") is not None:
        sys.modules.setdefault(_SIGNAL, _Signal(_SIGNAL))
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _Signal(ModuleType):
    """``scipy.signal`` until something of it is used; then the real one takes its place."""

    def hamming(self, *arguments: Any, **options: Any) -> Any:
        """The window that torchmetrics looks for, and makes if it is missing."""
        return self.windows.hamming(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        # Whoever looks through all modules asks where each comes from; an import of a part asks for the path.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        if sys.modules.get(_SIGNAL) is self:
            del sys.modules[_SIGNAL]
        real: Any = import_module(_SIGNAL)
        real.hamming = real.windows.hamming
        return getattr(real, name)
