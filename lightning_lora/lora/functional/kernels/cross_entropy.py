"""The cross-entropy of rows of scores and, in place of the scores, its gradient: two reads and one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.lora.functional.torch_internals import uninitialised

MAX_BLOCK = 4096
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


def cross_entropy_(scores: Tensor, labels: Tensor, factors: Tensor | None, gradient: bool, ignored: int) -> Tensor:
    """The loss of each row, ``(rows,)`` float32 in nats; the scores become its gradient.

    Args:
        scores: ``(rows, classes)``, float32 or lower; overwritten with
            ``factor * (softmax(scores) - onehot(label))`` if ``gradient``.
        labels: Integers in ``[0, classes)``, or ``ignored``, ``(rows,)``.
        factors: Multiplies loss and gradient of each row, ``(rows,)`` float32; None multiplies by 1.
        gradient: Whether to write the gradient.
        ignored: The label of rows whose loss and gradient are 0, below 0.
    """
    rows, classes = scores.shape
    losses = uninitialised(scores, (rows,), torch.float32)
    block = min(MAX_BLOCK, triton.next_power_of_2(classes))
    weights = losses if factors is None else factors  # a kernel that is told not to read them still wants a pointer
    strides = (*scores.stride(), labels.stride(0), weights.stride(0))
    with torch.cuda.device_of(scores):
        _cross_entropy[(rows,)](  # pyright: ignore[reportIndexIssue]
            scores, labels, weights, losses, *strides, classes, ignored,
            WEIGHTED=factors is not None, GRADIENT=gradient, BLOCK=block, **OPTIONS,
        )  # fmt: skip
    return losses


@triton.jit
def _cross_entropy(
    scores, labels, factors, losses,
    scores_row, scores_column, labels_row, factors_row,
    classes, ignored,
    WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores += row * scores_row
    label = tl.load(labels + row * labels_row)
    is_kept = label != ignored
    # Before the sums, where all threads wait for each other: later, one may already have overwritten this score.
    at_label = tl.load(scores + label * scores_column, mask=is_kept, other=0).to(tl.float32)
    # A finite start: -inf minus -inf would be NaN where the first block has no finite score.
    largest, total = -3.0e38, 0.0
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(scores + column * scores_column, mask=column < classes, other=-float("inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), 0)
    log_sum = largest + tl.log(total)
    factor = 1.0
    if WEIGHTED:
        factor = tl.load(factors + row * factors_row)
    tl.store(losses + row, tl.where(is_kept, factor * (log_sum - at_label), 0.0))
    if GRADIENT:
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(scores + column * scores_column, mask=column < classes).to(tl.float32)
            by_score = factor * (tl.exp(x - log_sum) - tl.where(column == label, 1.0, 0.0))
            tl.store(scores + column * scores_column, tl.where(is_kept, by_score, 0.0), mask=column < classes)
