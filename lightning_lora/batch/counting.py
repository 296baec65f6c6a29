"""Counts what a batch holds: rows, tokens, supervised tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lora.batch_facts import facts_of


def count_items(batch: Any) -> tuple[Tensor | int, str | None]:
    """Count the items of a batch, and name them: ``"tokens"``, ``"rows"``, or None if there is no tensor.

    With an ``attention_mask`` of one number per token, tokens that are not padding count; with ``input_ids`` alone, all
    tokens; otherwise rows, the first dimension of the first tensor.
    """
    if isinstance(batch, Mapping):
        mask, tokens = batch.get("attention_mask"), batch.get("input_ids")
        if isinstance(mask, Tensor) and mask.dim() == 2:  # a 4-D mask is a bias for attention, not a count
            return mask.detach().sum(), "tokens"
        if isinstance(tokens, Tensor):
            return tokens.numel(), "tokens"
    rows = count_rows(batch)
    return rows, "rows" if rows else None


def count_rows(batch: Any) -> int:
    """The first dimension of the first tensor in a batch, or 0 without a tensor. A packed row is one row."""
    tensor = _first_tensor(batch)
    if tensor is None:
        return 0
    return tensor.shape[0] if tensor.dim() else 1


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    children = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((tensor for tensor in map(_first_tensor, children) if tensor is not None), None)


def count_supervised(batch: Any) -> Tensor | int | None:
    """Count the tokens that a causal language model learns from; None without labels.

    The first label of a row does not count, because no position predicts it. The count is a number where the batch
    brings `BatchFacts`, else a tensor on its device.
    """
    if (facts := facts_of(batch)) is not None:
        return facts.count
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() < 2:
        return None
    return (labels[..., 1:] != -100).sum()
