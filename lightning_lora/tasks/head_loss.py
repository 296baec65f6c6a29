"""Output layer and cross-entropy in one: the scores of all tokens over the whole vocabulary are never held.

Rows without a label are dropped before the product with the weight. The others are walked over in chunks: scores,
loss and, where one is needed, the gradient of a chunk are made while it is in memory, so that backward only scales
what forward has left. A frozen weight costs no gradient.

Shape legend: ``*`` any leading axes, ``rows`` supervised ones among them, ``dim`` features of the hidden states,
``vocab`` classes, ``r`` rank of an update.
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

IGNORED = -100

# A chunk reads the whole weight twice: few rows make that the limit, many make the scores large. Measured on CPU
# (benchmarks/head_loss.py): below 256 rows time is lost, above 512 none is gained. A GPU needs some 200 at least.
CHUNK_ROWS = 512


class HeadScores(NamedTuple):
    """What an evaluation asks of every token.

    Args:
        losses: ``(*)``, nats, at least float32; 0 where there is no label.
        correct: ``(*)``, whether the label has the highest score; False where there is no label.
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
) -> Tensor:
    r"""``cross_entropy(hidden weight^T + bias, labels, reduction="sum") / divisor`` without ever holding all scores.

    Whatever needs a gradient gets it: the hidden states, the factors of an update, and weight and bias if they are
    trained. Their gradients are made in forward, one chunk at a time, so a second derivative is refused. Under
    ``torch.compile`` and inside ``torch.func`` transforms the plain formula is computed instead.

    The labels are those of the very rows they stand beside: shift them for next-token prediction.

    Args:
        hidden: ``(*, dim)``, what the output layer is given.
        weight: ``(vocab, dim)``.
        labels: ``(*)``, integers in ``[0, vocab)``, or -100 for rows that do not count.
        bias: ``(vocab,)``.
        update: A low-rank addition to the scores, ``(inner, B)`` of shapes ``(*, r)`` and ``(vocab, r)`` for
            ``inner B^T``. With LoRA on the output layer, ``inner`` is ``scale * hidden A^T``.
        divisor: What the sum is divided by, such as the number of supervised tokens in the batch; 1 at least is taken.

    Returns:
        A scalar in nats, at least float32. 0, with gradients of 0, where no row has a label.

    Raises:
        DataError: If a label is neither a class nor -100.

    Example:
        >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(5, 8)
        >>> labels = torch.tensor([[1, 4, -100], [0, -100, -100]])
        >>> float(head_loss(hidden, weight, labels, divisor=3).exp())  # five equal scores
        5.0
    """
    divisor = divisor.clamp(min=1) if torch.is_tensor(divisor) else max(divisor, 1)
    if is_traced():
        return _plain(hidden, weight, labels, bias, update) / divisor
    parts, bias, labels, _ = _supervised(hidden, weight, labels, bias, update)
    # Inside a Function inputs look as if they needed gradients even where gradients are off.
    if torch.is_grad_enabled():
        loss: Any = _HeadLoss.apply(labels, bias, *parts)
    else:
        loss = _sum_and_gradients(labels, bias, parts, [False] * (1 + len(parts)))[0]
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
    """Loss of every token and whether it is predicted right, for evaluation: no gradients, arguments of `head_loss`.

    Raises:
        DataError: If a label is neither a class nor -100.
    """
    shape = labels.shape
    parts, bias, labels, rows = _supervised(hidden, weight, labels, bias, update)
    losses = torch.zeros(shape, dtype=_wide(parts[0]), device=labels.device)
    correct = torch.zeros(shape, dtype=torch.bool, device=labels.device)
    for chunk in _chunks(labels, bias, parts):
        losses.view(-1)[rows[chunk.rows]] = chunk.losses
        correct.view(-1)[rows[chunk.rows]] = chunk.logits.argmax(-1) == labels[chunk.rows]
    return HeadScores(losses, correct)


def _plain(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, update: tuple[Tensor, Tensor] | None
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if update is not None:
        logits = logits + F.linear(*update)
    return F.cross_entropy(
        logits.to(_wide(logits)).flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _supervised(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, update: tuple[Tensor, Tensor] | None
) -> tuple[list[Tensor], Tensor | None, Tensor, Tensor]:
    """Inputs and weights in turn, bias and labels of the supervised rows, and which rows those are."""
    if hidden.shape[:-1] != labels.shape:
        raise DataError(
            f"head_loss needs one label for each row of the hidden states: those are {tuple(hidden.shape)}, labels are "
            f"{tuple(labels.shape)}."
        )
    labels = labels.flatten()
    (rows,) = (labels != IGNORED).nonzero(as_tuple=True)
    labels = labels[rows].long()
    _check(labels, len(weight))
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


def _check(labels: Tensor, vocab: int) -> None:
    if not len(labels):
        return
    for label in torch.stack(labels.aminmax()).tolist():
        if not 0 <= label < vocab:
            raise DataError(
                f"label {label} is no class of a head with {vocab}: labels are in [0, {vocab}), or {IGNORED} for rows "
                f"that do not count."
            )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # As autocast itself, which leaves float64 alone.
    return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _Chunk(NamedTuple):
    """Some supervised rows: which, their scores, probabilities and losses. The tables are overwritten by the next."""

    rows: slice
    logits: Tensor
    probabilities: Tensor
    losses: Tensor


def _chunks(labels: Tensor, bias: Tensor | None, parts: list[Tensor]) -> Iterator[_Chunk]:
    x, weight, *update = parts
    # Two tables for all chunks: on a CPU, fresh memory of this size costs as much as filling it.
    shape = min(len(labels), CHUNK_ROWS), len(weight)
    all_logits, all_probabilities = uninitialised(x, shape), uninitialised(x, shape, _wide(x))
    for start in range(0, len(labels), CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, len(labels)))
        logits, probabilities = all_logits[: rows.stop - start], all_probabilities[: rows.stop - start]
        affine_into(logits, x[rows], weight.T, bias)
        if update:
            logits.addmm_(update[0][rows], update[1].T)
        torch.softmax(logits, -1, dtype=probabilities.dtype, out=probabilities)
        # log-sum-exp by way of the likeliest class, whose probability cannot vanish as that of a label can.
        likeliest = logits.amax(-1).to(probabilities.dtype) - probabilities.amax(-1).log()
        losses = likeliest - logits.gather(-1, labels[rows, None]).squeeze(-1)
        yield _Chunk(rows, logits, probabilities, losses)


def _sum_and_gradients(
    labels: Tensor, bias: Tensor | None, parts: list[Tensor], needed: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The summed loss, and its gradients by bias and parts where ``needed``; those of weights are at least float32."""
    total = torch.zeros((), dtype=_wide(parts[0]), device=labels.device)
    gradients: list[Tensor | None] = [None] * len(needed)
    if needed[0]:
        assert bias is not None
        gradients[0] = torch.zeros_like(bias, dtype=_wide(bias))
    for i, part in enumerate(parts, 1):
        if needed[i]:
            is_weight = i % 2 == 0
            gradients[i] = torch.zeros_like(part, dtype=_wide(part)) if is_weight else uninitialised(part, part.shape)
    for chunk in _chunks(labels, bias, parts):
        total += chunk.losses.sum()
        if any(needed):
            _add_gradients(chunk, labels, parts, gradients)
    return total, gradients


def _add_gradients(chunk: _Chunk, labels: Tensor, parts: list[Tensor], gradients: list[Tensor | None]) -> None:
    by_logits = chunk.probabilities
    by_logits.scatter_add_(-1, labels[chunk.rows, None], -torch.ones_like(by_logits[:, :1]))
    by_bias, *by_parts = gradients
    if by_bias is not None:
        by_bias += by_logits.sum(0, dtype=by_bias.dtype)
    if by_logits.dtype is not chunk.logits.dtype:
        by_logits = chunk.logits.copy_(by_logits)
    for x, weight, by_x, by_weight in zip(parts[::2], parts[1::2], by_parts[::2], by_parts[1::2], strict=True):
        if by_x is not None:
            torch.mm(by_logits, weight, out=by_x[chunk.rows])
        if by_weight is None:
            continue
        if by_weight.dtype is x.dtype:
            by_weight.addmm_(by_logits.T, x[chunk.rows])
        else:
            by_weight += by_logits.T @ x[chunk.rows]


class _HeadLoss(torch.autograd.Function):
    """Summed loss of supervised rows; the gradients are ready when forward ends."""

    @staticmethod
    def forward(ctx: Any, labels: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
        total, gradients = _sum_and_gradients(labels, bias, list(parts), list(ctx.needs_input_grad[1:]))
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (bias, *parts)]
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *by_total: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "head_loss has no second derivative (create_graph=True): use F.cross_entropy(F.linear(...)) there."
            )
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *(None if g is None else (g * by_total[0]).to(dtype) for g, dtype in gradients)
