"""Output layer and cross-entropy in one function, which never holds the logits of all tokens.

Rows are processed in chunks (`head_chunks`): the logits, the loss and, if it is needed, the gradient of a chunk are
computed while the chunk is in memory, and backward only scales the gradients that forward has stored. A frozen weight
costs no gradient.

Shape legend: ``*`` any leading axes, ``rows`` the number of supervised rows, ``dim`` features of the hidden states,
``vocab`` number of classes, ``r`` rank of an update.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.batch_facts import BatchFacts
from lightning_lora.lora.functional.kernels import chosen
from lightning_lora.lora.functional.torch_internals import is_traced, uninitialised
from lightning_lora.tasks.head_chunks import (
    IGNORE_INDEX,
    add_gradients,
    empty_gradients,
    logit_chunks,
    plain_logits,
    rows_of_chunk,
    supervised_rows,
    wide_type,
)


class HeadScores(NamedTuple):
    """The loss of every token, and whether it is predicted correctly.

    Args:
        losses: ``(*)``, in nats, at least float32; 0 for tokens without a label.
        correct: ``(*)``, True where the label has the highest logit; False for tokens without a label.
    """

    losses: Tensor
    correct: Tensor


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    update: tuple[Tensor, Tensor] | None = None,
    divisor: Tensor | float = 1,
    factors: Tensor | None = None,
    facts: BatchFacts | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    r"""``cross_entropy(hidden weight^T + bias, labels, reduction="sum") / divisor`` without holding all logits.

    Every input that requires a gradient gets it: the hidden states, the factors of an update, the weight and the bias.
    The gradients are computed in forward, one chunk at a time, so a second derivative is refused. Under
    ``torch.compile`` and inside ``torch.func`` transforms the plain formula is computed instead.

    Labels are not shifted: for next-token prediction, shift them before the call.

    Args:
        hidden: Input of the output layer, ``(*, dim)``.
        weight: Weight of the output layer, ``(vocab, dim)``.
        labels: Integers in ``[0, vocab)``, or -100 for rows without a loss, ``(*)``.
        bias: Bias of the output layer, ``(vocab,)``.
        update: A low-rank addition to the logits, ``inner B^T``, given as ``(inner, B)`` of shapes ``(*, r)`` and
            ``(vocab, r)``. With LoRA on the output layer, ``inner`` is ``scale * hidden A^T``.
        divisor: Divides the sum, such as the number of supervised tokens in the batch or the sum of their factors; 0
            counts as 1.
        factors: Multiplies the loss of each row, ``(*)``; None multiplies by 1.
        facts: Which rows have a label, found when the batch was made. None, or those of other labels: they are looked
            for on the device, which the host waits for, and which a CUDA graph cannot hold.
        chunk_rows: Rows of which logits are held at a time, at least 1; None: 512. More are faster on a GPU.

    Returns:
        A scalar in nats, at least float32. If no row has a label it is 0, and so are its gradients.

    Raises:
        DataError: If a label is neither a class nor -100.

    Example:
        >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(5, 8)
        >>> labels = torch.tensor([[1, 4, -100], [0, -100, -100]])
        >>> float(head_loss(hidden, weight, labels, divisor=3).exp())  # five equal scores
        5.0
    """
    divisor = divisor.masked_fill(divisor == 0, 1) if torch.is_tensor(divisor) else divisor or 1
    if is_traced():
        return _plain(hidden, weight, labels, bias, update, factors) / divisor
    parts, bias, labels, rows = supervised_rows(hidden, weight, labels, bias, update, facts)
    if factors is not None:
        factors = factors.flatten()[rows].to(wide_type(parts[0]))
    # Inside a Function, inputs seem to require gradients even while gradients are disabled.
    if torch.is_grad_enabled():
        loss: Any = _HeadLoss.apply(chunk_rows, labels, factors, bias, *parts)
    else:
        loss = _sum_and_gradients(chunk_rows, labels, factors, bias, parts, [False] * (1 + len(parts)))[0]
    return loss / divisor


@torch.no_grad()
def head_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    update: tuple[Tensor, Tensor] | None = None,
    facts: BatchFacts | None = None,
    chunk_rows: int | None = None,
) -> HeadScores:
    """Compute the loss of every token and whether it is predicted correctly, without gradients.

    The arguments are those of `head_loss`.

    Raises:
        DataError: If a label is neither a class nor -100.
    """
    shape = labels.shape
    parts, bias, labels, rows = supervised_rows(hidden, weight, labels, bias, update, facts)
    losses = torch.zeros(shape, dtype=wide_type(parts[0]), device=labels.device)
    correct = torch.zeros(shape, dtype=torch.bool, device=labels.device)
    for chunk in _chunks(chunk_rows, labels, bias, parts):
        losses.view(-1)[rows[chunk.rows]] = chunk.losses
        correct.view(-1)[rows[chunk.rows]] = chunk.logits.argmax(-1) == labels[chunk.rows]
    return HeadScores(losses, correct)


def loss_as_logits(**head: Any) -> Tensor:
    """`head_loss` with the axes of logits, for `compute_at_head`."""
    # A copy, because FSDP2 warns if a model returns a view.
    return head_loss(**head).view(1, 1, 1).clone()


def scores_as_logits(**head: Any) -> Tensor:
    """`head_scores`, ``(*, 2)``: losses, and whether they are correct."""
    losses, correct = head_scores(**head)
    return torch.stack([losses, correct.to(losses.dtype)], -1)


def _plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    update: tuple[Tensor, Tensor] | None,
    factors: Tensor | None,
) -> Tensor:
    losses = F.cross_entropy(
        plain_logits(hidden, weight, bias, update).flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum" if factors is None else "none",
    )
    return losses if factors is None else (losses * factors.flatten()).sum()


class _Chunk(NamedTuple):
    """A slice of the supervised rows with their logits, probabilities and losses.

    The next chunk overwrites the tensors of logits and probabilities.
    """

    rows: slice
    logits: Tensor
    probabilities: Tensor
    losses: Tensor


def _chunks(most: int | None, labels: Tensor, bias: Tensor | None, parts: list[Tensor]) -> Iterator[_Chunk]:
    all_probabilities: Tensor | None = None
    for rows, logits in logit_chunks(bias, parts, most):
        if all_probabilities is None:
            all_probabilities = uninitialised(logits, logits.shape, wide_type(logits))
        probabilities = all_probabilities[: len(logits)]
        torch.softmax(logits, -1, dtype=probabilities.dtype, out=probabilities)
        # log-sum-exp from the likeliest class, whose probability cannot underflow as that of the label can.
        log_sum_exp = logits.amax(-1).to(probabilities.dtype) - probabilities.amax(-1).log()
        losses = log_sum_exp - logits.gather(-1, labels[rows, None]).squeeze(-1)
        yield _Chunk(rows, logits, probabilities, losses)


def _sum_and_gradients(
    most: int | None,
    labels: Tensor,
    factors: Tensor | None,
    bias: Tensor | None,
    parts: list[Tensor],
    needed: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The summed loss and its gradients for bias and parts where ``needed``; weight gradients are at least float32."""
    total = torch.zeros((), dtype=wide_type(parts[0]), device=labels.device)
    gradients = empty_gradients(bias, parts, needed)
    x, weight, *_ = parts
    has_kernel = chosen("cross_entropy", str(len(weight)), rows_of_chunk(x, most), *parts)
    steps = (_steps_by_kernel if has_kernel else _steps)(most, labels, factors, bias, parts, any(needed))
    for rows, losses, logit_grads, logits in steps:
        total += losses.sum()
        if logit_grads is not None:
            add_gradients(rows, logit_grads, logits, parts, gradients)
    return total, gradients


_Step = tuple[slice, Tensor, Tensor | None, Tensor]
"""Rows of a chunk, their losses times their factors, the gradients of their logits if asked for, and their logits."""


def _steps(
    most: int | None,
    labels: Tensor,
    factors: Tensor | None,
    bias: Tensor | None,
    parts: list[Tensor],
    needs_gradients: bool,
) -> Iterator[_Step]:
    for chunk in _chunks(most, labels, bias, parts):
        losses = chunk.losses if factors is None else chunk.losses * factors[chunk.rows]
        logit_grads = _logit_grads(chunk, labels, factors) if needs_gradients else None
        yield chunk.rows, losses, logit_grads, chunk.logits


def _steps_by_kernel(
    most: int | None,
    labels: Tensor,
    factors: Tensor | None,
    bias: Tensor | None,
    parts: list[Tensor],
    needs_gradients: bool,
) -> Iterator[_Step]:
    from lightning_lora.lora.functional.kernels.cross_entropy import cross_entropy_

    for rows, logits in logit_chunks(bias, parts, most):
        weights = None if factors is None else factors[rows]
        losses = cross_entropy_(logits, labels[rows], weights, needs_gradients, IGNORE_INDEX)
        yield rows, losses, logits if needs_gradients else None, logits


def _logit_grads(chunk: _Chunk, labels: Tensor, factors: Tensor | None) -> Tensor:
    """Probabilities minus 1 at the labels, times the factors, in place of the probabilities."""
    logit_grads = chunk.probabilities
    logit_grads.scatter_add_(-1, labels[chunk.rows, None], -torch.ones_like(logit_grads[:, :1]))
    return logit_grads if factors is None else logit_grads.mul_(factors[chunk.rows, None])


class _HeadLoss(torch.autograd.Function):
    """Summed loss of the supervised rows; forward computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any, most: int | None, labels: Tensor, factors: Tensor | None, bias: Tensor | None, *parts: Tensor
    ) -> Tensor:
        needed = list(ctx.needs_input_grad[3:])
        total, gradients = _sum_and_gradients(most, labels, factors, bias, list(parts), needed)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (bias, *parts)]
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *by_total: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "head_loss has no second derivative (create_graph=True): use F.cross_entropy(F.linear(...)) instead."
            )
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, None, *(None if g is None else (g * by_total[0]).to(dtype) for g, dtype in gradients)
