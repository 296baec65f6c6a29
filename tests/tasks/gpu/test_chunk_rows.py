"""Rows of which the loss at the head holds logits at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import ConfigError
from lightning_lora.tasks.head_loss import head_loss, head_scores
from tests.tasks.test_head_loss import DIM, ROWS, TOKENS, VOCAB, gradients, inputs, labels, plain


@pytest.mark.parametrize("rows", [1, 3, 512])
def test_rows_of_a_chunk_are_a_matter_of_memory_only(rows: int) -> None:
    """Each chunk holds so many rows of logits, of the types of its computation, and the loss is the same."""
    given, target = inputs(hidden=True, weight=True), labels(1.0)
    chosen = given["hidden"], given["weight"], target
    seen: list[int] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.out and result.shape[-1] == VOCAB:
                seen.append(len(result))
            return result

    with Products():
        loss = head_loss(*chosen, chunk_rows=rows)
    assert max(seen) == min(rows, ROWS * TOKENS)
    assert sum(seen) == ROWS * TOKENS
    wanted = plain(target, given["hidden"], given["weight"])
    torch.testing.assert_close(loss, wanted)
    for name, gradient in gradients(loss, given).items():
        torch.testing.assert_close(gradient, gradients(plain(target, given["hidden"], given["weight"]), given)[name])
    scores = head_scores(*chosen, chunk_rows=rows)
    torch.testing.assert_close(scores.losses.sum(), wanted.detach())


def test_a_chunk_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="a chunk of the head needs 1 row or more, got chunk_rows=0"):
        head_loss(torch.randn(2, DIM), torch.randn(VOCAB, DIM), torch.tensor([0, 1]), chunk_rows=0)
