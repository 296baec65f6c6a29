"""The logits of an output layer, a chunk of rows at a time, and their gradients.

Rows without a label are dropped before the product with the weight. A chunk overwrites the logits of the one before it.

Shape legend: ``*`` any leading axes, ``rows`` the number of supervised rows, ``dim`` features of the hidden states,
``vocab`` number of classes, ``r`` rank of an update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.batch_facts import BatchFacts
from lightning_lora.errors import DataError, TaskSettingError
from lightning_lora.lora.functional.linear_products import affine_into
from lightning_lora.lora.functional.torch_internals import uninitialised

IGNORE_INDEX = -100

# Each chunk reads the whole weight twice, so small chunks are slow; large ones hold many logits. Measured on a CPU
# (benchmarks/head_loss.py): below 256 rows time is lost, above 512 none is gained. A GPU gains above (`StepMemory`).
CHUNK_ROWS = 512


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, update: tuple[Tensor, Tensor] | None) -> Tensor:
    """All logits at once, ``(*, vocab)``, at least float32."""
    logits = F.linear(hidden, weight, bias)
    return at_least_float32(logits if update is None else logits + F.linear(*update))


def supervised_rows(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    update: tuple[Tensor, Tensor] | None,
    facts: BatchFacts | None = None,
) -> tuple[list[Tensor], Tensor | None, Tensor, Tensor]:
    """The rows with a label. Without ``facts`` that fit the labels, finding them waits for the device twice.

    Returns:
        Parts (inputs ``(rows, dim)`` and weights in turn), bias and labels of these rows, and their indices.

    Raises:
        DataError: If a label is neither a class nor -100, or there is not one label for each row.
    """
    if hidden.shape[:-1] != labels.shape:
        raise DataError(
            f"an output layer needs one label for each row: the hidden states are {tuple(hidden.shape)}, the labels "
            f"are {tuple(labels.shape)}."
        )
    if facts is not None and facts.fit(labels):
        rows, labels = facts.places, labels.flatten()[facts.places].long()
        _check_labels(facts.labels, len(weight))
    else:
        labels = labels.flatten()
        (rows,) = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
        labels = labels[rows].long()
        if len(labels):
            _check_labels(torch.stack(labels.aminmax()).tolist(), len(weight))
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


def rows_of_chunk(x: Tensor, most: int | None) -> int:
    """Rows of all chunks but the last, for inputs ``(rows, dim)``: ``most``, or `CHUNK_ROWS` for None."""
    if most is not None and most < 1:
        raise TaskSettingError(f"a chunk of the head needs 1 row or more, got chunk_rows={most}.")
    return min(len(x), CHUNK_ROWS if most is None else most)


def logit_chunks(bias: Tensor | None, parts: list[Tensor], most: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows and their logits, ``(rows_of_chunk, vocab)`` at most, which the caller may overwrite."""
    x, weight, *update = parts
    size = rows_of_chunk(x, most)
    # All chunks share one tensor: on a CPU, allocating memory of this size takes as long as filling it.
    all_logits = uninitialised(x, (size, len(weight)))
    for start in range(0, len(x), max(size, 1)):
        rows = slice(start, min(start + size, len(x)))
        logits = all_logits[: rows.stop - start]
        affine_into(logits, x[rows], weight.T, bias)
        if update:
            logits.addmm_(update[0][rows], update[1].T)
        yield rows, logits


def empty_gradients(bias: Tensor | None, parts: list[Tensor], needed: list[bool]) -> list[Tensor | None]:
    """Gradients of bias and parts where ``needed``, for `add_gradients`; those of weights are at least float32."""
    gradients: list[Tensor | None] = [None] * len(needed)
    if needed[0]:
        assert bias is not None
        gradients[0] = torch.zeros_like(bias, dtype=wide_type(bias))
    for i, part in enumerate(parts, 1):
        if needed[i]:
            is_weight = i % 2 == 0
            gradients[i] = (
                torch.zeros_like(part, dtype=wide_type(part)) if is_weight else uninitialised(part, part.shape)
            )
    return gradients


def add_gradients(
    rows: slice, logit_grads: Tensor, logits: Tensor, parts: list[Tensor], gradients: list[Tensor | None]
) -> None:
    """Add the gradients that follow from those of a chunk's logits.

    Args:
        rows: Rows of the chunk.
        logit_grads: Gradients of its logits, at least float32.
        logits: The tensor of its logits, which is overwritten with ``logit_grads`` in its own type.
        parts: Inputs and weights in turn.
        gradients: What `empty_gradients` has made; added to in place.
    """
    bias_grad, *part_grads = gradients
    if bias_grad is not None:
        bias_grad += logit_grads.sum(0, dtype=bias_grad.dtype)
    if logit_grads.dtype is not logits.dtype:
        logit_grads = logits.copy_(logit_grads)
    for x, weight, x_grad, weight_grad in zip(parts[::2], parts[1::2], part_grads[::2], part_grads[1::2], strict=True):
        if x_grad is not None:
            torch.mm(logit_grads, weight, out=x_grad[rows])
        if weight_grad is None:
            continue
        if weight_grad.dtype is x.dtype:
            weight_grad.addmm_(logit_grads.T, x[rows])
        else:
            weight_grad += logit_grads.T @ x[rows]


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or in its own type if that is wider."""
    return tensor.to(wide_type(tensor))


def wide_type(tensor: Tensor) -> torch.dtype:
    """float32, or the type of ``tensor`` if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_labels(extremes: Iterable[int], vocab: int) -> None:
    for label in extremes:
        if not 0 <= label < vocab:
            raise DataError(
                f"label {label} is outside the {vocab} classes of the head: labels are in [0, {vocab}), or "
                f"{IGNORE_INDEX} for rows without a loss."
            )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Autocast leaves float64 alone too.
    return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)
