"""Labels, weights and number of the supervised tokens of a batch, by the token before each."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_lora.batch_facts import BatchFacts
from lightning_lora.errors import DataError
from lightning_lora.tasks.head_chunks import IGNORE_INDEX, at_least_float32


def next_token_labels(batch: dict[str, Tensor]) -> Tensor:
    """The label of the token after each token, ``(rows, tokens)``; -100 for the last token of an example."""
    labels = batch["labels"][:, 1:]
    if "position_ids" in batch:
        # transformers starts a new example wherever positions do not rise by 1.
        labels = labels.masked_fill(batch["position_ids"].diff() != 1, IGNORE_INDEX)
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)


def next_token_weights(batch: dict[str, Tensor]) -> Tensor | None:
    """The weight of the token after each token, ``(rows, tokens)``; None if all tokens weigh the same.

    Raises:
        DataError: If there is not one weight for each token.
    """
    weights = batch.get("weights")
    if weights is None:
        return None
    if weights.shape != batch["labels"].shape:
        shapes = f"weights are {tuple(weights.shape)}, labels {tuple(batch['labels'].shape)}"
        raise DataError(f"a batch needs one weight for each token: {shapes}.")
    # The precisions bf16-true and 16-true convert every number of a batch; sums would lose digits.
    return F.pad(at_least_float32(weights[:, 1:]), (0, 1))


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """``values`` times the weights, if there are any."""
    return values if weights is None else values * weights


def num_tokens(labels: Tensor, weights: Tensor | None, facts: BatchFacts | None) -> Tensor | int:
    """The number of supervised tokens, or the sum of their weights."""
    if facts is not None and weights is None:
        return facts.count
    return weighted(labels != IGNORE_INDEX, weights).sum()
