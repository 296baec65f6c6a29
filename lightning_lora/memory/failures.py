"""One error for a step that cannot be traced: which module, which operation, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from torch import nn

from lightning_lora.errors import ConfigError, LoRAError

_WHAT_TO_DO = (
    "its memory is not known before it runs. A trace has shapes and no values: give a custom operation a fake kernel "
    "(torch.library.register_fake), and avoid shapes that depend on values; or run it with MemoryAdvice"
)


class TraceError(ConfigError):
    """A training step cannot be run without values, so its memory is not known before the run.

    Read the reason in the message; the run itself is not hindered.
    """

    code = "LL508"
    page = "understand/plan.md#memory"


@contextlib.contextmanager
def explained(module: nn.Module, doing: str, last_operation: list[Any]) -> Iterator[None]:
    """Raise a `TraceError` in place of any error but those of this package.

    Args:
        doing: What was tried, such as ``"a training step"``.
        last_operation: The operation that failed, if one did.
    """
    try:
        yield
    except LoRAError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        where = _child(module, error.__traceback__)
        operation = f", in operation {last_operation[-1]}" if last_operation else ""
        raise TraceError(
            f"{doing} of {type(module).__name__} cannot be traced{where}{operation}: {type(error).__name__}: "
            f"{lines[0] if lines else 'no message'}; {_WHAT_TO_DO}."
        ) from error


def _child(module: nn.Module, traceback: TracebackType | None) -> str:
    """The innermost child of ``module`` that was running."""
    names = {id(child): name for name, child in module.named_modules() if name}
    found = ""
    while traceback is not None:
        running = traceback.tb_frame.f_locals.get("self")
        if id(running) in names:
            found = f" in {names[id(running)]!r} ({type(running).__name__})"
        traceback = traceback.tb_next
    return found
