"""A reward in the process that trains computes in its own precision, not in that of the policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_precision() -> Iterator[None]:
    """Within the context there is no autocast and no gradient, and new tensors are float32.

    Lightning evaluates within autocast, or with a default type of lower precision, and fetches batches outside of it.
    """
    default, accelerator = torch.get_default_dtype(), torch.accelerator.current_accelerator(check_available=True)
    kinds = {"cpu", *([] if accelerator is None else [accelerator.type])}
    torch.set_default_dtype(torch.float32)
    try:
        with torch.no_grad(), ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_default_dtype(default)
