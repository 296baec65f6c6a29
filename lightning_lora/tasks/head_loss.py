"""Output layer and cross-entropy in one function, which never holds the logits of all tokens.

Rows without a label are dropped before the product with the weight. The remaining rows are processed in chunks: the
logits, the loss and, if it is needed, the gradient of a chunk are computed while the chunk is in memory, and backward
only scales the gradients that forward has stored. A frozen weight costs no gradient.

Shape legend: ``*`` any leading axes, ``rows`` the number of supervised rows, ``dim`` features of the hidden states,
``vocab`` number of classes, ``r`` rank of an update.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.errors import DataError
from lightning_lora.lora.functional.linear_products import affine_into
from lightning_lora.lora.functional.torch_internals import is_traced, uninitialised

IGNORE_INDEX = -100

# Each chunk reads the whole weight twice, so small chunks are slow; large ones hold many logits. Measured on a CPU
# (benchmarks/head_loss.py): below 256 rows time is lost, above 512 none is gained. A GPU needs at least about 200.
CHUNK_ROWS = 512


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
    parts, bias, labels, rows = _supervised(hidden, weight, labels, bias, update)
    if factors is not None:
        factors = factors.flatten()[rows].to(_at_least_float32(parts[0]))
    # Inside a Function, inputs seem to require gradients even while gradients are disabled.
    if torch.is_grad_enabled():
        loss: Any = _HeadLoss.apply(labels, factors, bias, *parts)
    else:
        loss = _sum_and_gradients(labels, factors, bias, parts, [False] * (1 + len(parts)))[0]
    return loss / divisor


@torch.no_grad()
def head_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    update: tuple[Tensor, Tensor] | None = None,
) -> HeadScores:
    """Compute the loss of every token and whether it is predicted correctly, without gradients.

    The arguments are those of `head_loss`.

    Raises:
        DataError: If a label is neither a class nor -100.
    """
    shape = labels.shape
    parts, bias, labels, rows = _supervised(hidden, weight, labels, bias, update)
    losses = torch.zeros(shape, dtype=_at_least_float32(parts[0]), device=labels.device)
    correct = torch.zeros(shape, dtype=torch.bool, device=labels.device)
    for chunk in _chunks(labels, bias, parts):
        losses.view(-1)[rows[chunk.rows]] = chunk.losses
        correct.view(-1)[rows[chunk.rows]] = chunk.logits.argmax(-1) == labels[chunk.rows]
    return HeadScores(losses, correct)


def _plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    update: tuple[Tensor, Tensor] | None,
    factors: Tensor | None,
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if update is not None:
        logits = logits + F.linear(*update)
    losses = F.cross_entropy(
        at_least_float32(logits).flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum" if factors is None else "none",
    )
    return losses if factors is None else (losses * factors.flatten()).sum()


def _supervised(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, update: tuple[Tensor, Tensor] | None
) -> tuple[list[Tensor], Tensor | None, Tensor, Tensor]:
    """Parts (inputs and weights in turn), bias and labels of the supervised rows, and the indices of these rows."""
    if hidden.shape[:-1] != labels.shape:
        raise DataError(
            f"head_loss needs one label for each row: the hidden states are {tuple(hidden.shape)}, the labels are "
            f"{tuple(labels.shape)}."
        )
    labels = labels.flatten()
    (rows,) = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    labels = labels[rows].long()
    _check_labels(labels, len(weight))
    parts = []
    for x, matrix in ((hidden, weight), *(() if update is None else (update,))):
        x = x.flatten(0, -2)
        parts += [x if len(rows) == len(x) else x.index_select(0, rows), matrix]
    if torch.is_autocast_enabled(hidden.device.type):
        # Cast once; autocast would cast the weight anew for each chunk.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        parts = [_cast(part, dtype) for part in parts]
        bias = None if bias is None else _cast(bias, dtype)
    return parts, bias, labels, rows


def _check_labels(labels: Tensor, vocab: int) -> None:
    if not len(labels):
        return
    for label in torch.stack(labels.aminmax()).tolist():
        if not 0 <= label < vocab:
            raise DataError(
                f"label {label} is outside the {vocab} classes of the head: labels are in [0, {vocab}), or "
                f"{IGNORE_INDEX} for rows without a loss."
            )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Autocast leaves float64 alone too.
    return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or in its own type if that is wider."""
    return tensor.to(_at_least_float32(tensor))


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _Chunk(NamedTuple):
    """A slice of the supervised rows with their logits, probabilities and losses.

    The next chunk overwrites the tensors of logits and probabilities.
    """

    rows: slice
    logits: Tensor
    probabilities: Tensor
    losses: Tensor


def _chunks(labels: Tensor, bias: Tensor | None, parts: list[Tensor]) -> Iterator[_Chunk]:
    x, weight, *update = parts
    # All chunks share two tensors: on a CPU, allocating memory of this size takes as long as filling it.
    shape = min(len(labels), CHUNK_ROWS), len(weight)
    all_logits, all_probabilities = uninitialised(x, shape), uninitialised(x, shape, _at_least_float32(x))
    for start in range(0, len(labels), CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, len(labels)))
        logits, probabilities = all_logits[: rows.stop - start], all_probabilities[: rows.stop - start]
        affine_into(logits, x[rows], weight.T, bias)
        if update:
            logits.addmm_(update[0][rows], update[1].T)
        torch.softmax(logits, -1, dtype=probabilities.dtype, out=probabilities)
        # log-sum-exp from the likeliest class, whose probability cannot underflow as that of the label can.
        log_sum_exp = logits.amax(-1).to(probabilities.dtype) - probabilities.amax(-1).log()
        losses = log_sum_exp - logits.gather(-1, labels[rows, None]).squeeze(-1)
        yield _Chunk(rows, logits, probabilities, losses)


def _sum_and_gradients(
    labels: Tensor, factors: Tensor | None, bias: Tensor | None, parts: list[Tensor], needed: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The summed loss and its gradients for bias and parts where ``needed``; weight gradients are at least float32."""
    total = torch.zeros((), dtype=_at_least_float32(parts[0]), device=labels.device)
    gradients: list[Tensor | None] = [None] * len(needed)
    if needed[0]:
        assert bias is not None
        gradients[0] = torch.zeros_like(bias, dtype=_at_least_float32(bias))
    for i, part in enumerate(parts, 1):
        if needed[i]:
            is_weight = i % 2 == 0
            gradients[i] = (
                torch.zeros_like(part, dtype=_at_least_float32(part)) if is_weight else uninitialised(part, part.shape)
            )
    for chunk in _chunks(labels, bias, parts):
        total += (chunk.losses if factors is None else chunk.losses * factors[chunk.rows]).sum()
        if any(needed):
            _add_gradients(chunk, labels, factors, parts, gradients)
    return total, gradients


def _add_gradients(
    chunk: _Chunk, labels: Tensor, factors: Tensor | None, parts: list[Tensor], gradients: list[Tensor | None]
) -> None:
    logit_grads = chunk.probabilities
    logit_grads.scatter_add_(-1, labels[chunk.rows, None], -torch.ones_like(logit_grads[:, :1]))
    if factors is not None:
        logit_grads *= factors[chunk.rows, None]
    bias_grad, *part_grads = gradients
    if bias_grad is not None:
        bias_grad += logit_grads.sum(0, dtype=bias_grad.dtype)
    if logit_grads.dtype is not chunk.logits.dtype:
        logit_grads = chunk.logits.copy_(logit_grads)
    for x, weight, x_grad, weight_grad in zip(parts[::2], parts[1::2], part_grads[::2], part_grads[1::2], strict=True):
        if x_grad is not None:
            torch.mm(logit_grads, weight, out=x_grad[chunk.rows])
        if weight_grad is None:
            continue
        if weight_grad.dtype is x.dtype:
            weight_grad.addmm_(logit_grads.T, x[chunk.rows])
        else:
            weight_grad += logit_grads.T @ x[chunk.rows]


class _HeadLoss(torch.autograd.Function):
    """Summed loss of the supervised rows; forward computes the gradients too."""

    @staticmethod
    def forward(ctx: Any, labels: Tensor, factors: Tensor | None, bias: Tensor | None, *parts: Tensor) -> Tensor:
        total, gradients = _sum_and_gradients(labels, factors, bias, list(parts), list(ctx.needs_input_grad[2:]))
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
        return None, None, *(None if g is None else (g * by_total[0]).to(dtype) for g, dtype in gradients)
