"""The losses of single rows, as `predict_step` of a module gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def batch_losses(found: Any) -> tuple[Tensor, Tensor | None] | None:
    """What `predict_step` says of a batch: the mean loss of each row, and their tokens.

    Returns:
        ``(rows,)`` losses in float64, and ``(rows,)`` numbers of tokens, None where it names none; None if it gives no
        losses.
    """
    if not isinstance(found, Mapping) or not isinstance(found.get("loss"), Tensor):
        return None
    tokens = found.get("tokens")
    losses = found["loss"].detach().double().reshape(-1)
    return losses, tokens.detach().reshape(-1) if isinstance(tokens, Tensor) else None
