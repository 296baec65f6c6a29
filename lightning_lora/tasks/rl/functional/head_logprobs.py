"""Log-probabilities of tokens and entropies out of an output layer, which never holds the logits of all tokens.

Rows are processed in chunks, as in `lightning_lora.tasks.head_loss`. A sum of losses can store its gradients in
forward; here the weight of each token is known only in backward, which therefore computes each chunk again.

Shape legend: ``*`` any leading axes, ``rows`` the number of scored tokens, ``dim`` features of the hidden states,
``vocab`` number of classes, ``r`` rank of an update.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.batch_facts import BatchFacts
from lightning_lora.errors import PolicySettingError
from lightning_lora.lora.functional.torch_internals import is_traced, uninitialised
from lightning_lora.tasks.head_chunks import (
    IGNORE_INDEX,
    add_gradients,
    at_least_float32,
    empty_gradients,
    logit_chunks,
    plain_logits,
    supervised_rows,
    wide_type,
)

# A forward pass holds the logits of a chunk, and their exponentials for so many rows.
_PART_ROWS = 128


class TokenLogprobs(NamedTuple):
    """What a model says of given tokens.

    Args:
        logprobs: Natural logarithm of the probability of each token, ``(*)``, at least float32; 0 where masked.
        entropy: Entropy of the distribution that each token is drawn from, ``(*)``, nats; 0 where masked.
    """

    logprobs: Tensor
    entropy: Tensor


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    update: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    facts: BatchFacts | None = None,
    chunk_rows: int | None = None,
) -> TokenLogprobs:
    r"""``log_softmax((hidden weight^T + bias) / temperature)`` at ``ids``, and its entropy, without holding all logits.

    Every input that requires a gradient gets it, from log-probabilities and entropies alike. Backward computes the
    logits again, a chunk at a time, and refuses a second derivative. Under ``torch.compile`` and inside ``torch.func``
    transforms the plain formula is computed instead.

    Ids are not shifted: ``ids[t]`` is the token that follows ``hidden[t]``.

    Args:
        hidden: Input of the output layer, ``(*, dim)``.
        weight: Weight of the output layer, ``(vocab, dim)``.
        ids: Tokens to score, integers in ``[0, vocab)``, ``(*)``.
        mask: Nonzero where a token is scored, ``(*)``; the ids elsewhere are not read. None scores all tokens.
        bias: Bias of the output layer, ``(vocab,)``.
        update: A low-rank addition to the logits, ``inner B^T``, given as ``(inner, B)`` of shapes ``(*, r)`` and
            ``(vocab, r)``. With LoRA on the output layer, ``inner`` is ``scale * hidden A^T``.
        temperature: Divides the logits, above 0.
        facts: Which tokens are scored, as in `head_loss`; None looks for them on the device.
        chunk_rows: Rows of which logits are held at a time, at least 1; None: 512. More are faster on a GPU.

    Raises:
        ConfigError: If the temperature is not above 0.
        DataError: If a scored id is no class.

    Example:
        >>> hidden, weight = torch.zeros(1, 3, 8), torch.zeros(5, 8)
        >>> logprobs, entropy = head_logprobs(hidden, weight, torch.tensor([[1, 4, 2]]), torch.tensor([[0, 1, 1]]))
        >>> [round(float(p), 2) for p in logprobs.exp()[0]]  # five equal logits; 1 where nothing is scored
        [1.0, 0.2, 0.2]
    """
    if not temperature > 0:
        raise PolicySettingError(f"temperature must be above 0 to score tokens, got {temperature!r}.")
    labels = ids if mask is None else ids.where(mask.bool(), IGNORE_INDEX)
    if is_traced():
        return _plain(plain_logits(hidden, weight, bias, update) / temperature, labels)
    parts, bias, scored, rows = supervised_rows(hidden, weight, labels, bias, update, facts)
    if torch.is_grad_enabled():
        found: Any = _HeadLogprobs.apply(chunk_rows, scored, temperature, bias, *parts)
    else:
        found = _forward(chunk_rows, scored, temperature, bias, parts)[:2]
    zeros = found[0].new_zeros(labels.numel())
    return TokenLogprobs(*(zeros.index_put((rows,), values).view(labels.shape) for values in found))


def logprobs_of_logits(
    logits: Tensor, ids: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> TokenLogprobs:
    """The same of logits ``(*, vocab)``, for models that change the output of their output layer.

    Args:
        logits: Scores of the token after each token, ``(*, vocab)``.
        ids: Tokens to score, ``(*)``.
        mask: Nonzero where a token is scored, ``(*)``. None scores all tokens.
        temperature: Divides the logits, above 0.
    """
    labels = ids if mask is None else ids.where(mask.bool(), IGNORE_INDEX)
    return _plain(at_least_float32(logits) / temperature, labels)


def _plain(scaled: Tensor, labels: Tensor) -> TokenLogprobs:
    logprobs, scored = scaled.log_softmax(-1), labels != IGNORE_INDEX
    found = logprobs.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return TokenLogprobs(found.where(scored, 0), entropy.where(scored, 0))


def _forward(
    most: int | None, ids: Tensor, temperature: float, bias: Tensor | None, parts: list[Tensor]
) -> tuple[Tensor, ...]:
    """Log-probabilities, entropies and the logarithm of the sum of exponentials of each row, ``(rows,)``."""
    dtype = wide_type(parts[0])
    logprobs, entropy, log_sums = (uninitialised(parts[0], ids.shape, dtype) for _ in range(3))
    for rows, logits in logit_chunks(bias, parts, most):
        for start in range(0, len(logits), _PART_ROWS):
            part = slice(rows.start + start, min(rows.start + start + _PART_ROWS, rows.stop))
            scaled = _scaled(logits[start : start + _PART_ROWS], temperature)
            logprobs[part], entropy[part], log_sums[part] = _of_part(scaled, ids[part])
    return logprobs, entropy, log_sums


def _of_part(scaled: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """The same for some rows of a chunk, from their logits, which are overwritten."""
    largest = scaled.amax(-1, keepdim=True)
    scaled -= largest
    exponentials = scaled.exp()
    sums = exponentials.sum(-1)
    log_sums = sums.log()
    # As a product of matrices, this sum needs no further tensor of the chunk's size.
    entropy = log_sums - (exponentials[:, None] @ scaled[..., None]).flatten() / sums
    return scaled.gather(-1, ids[:, None]).squeeze(-1) - log_sums, entropy, largest.squeeze(-1) + log_sums


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits over temperature, at least float32; in place where the type allows it."""
    wide = at_least_float32(logits)
    return wide if temperature == 1 else wide.div_(temperature)


class _HeadLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies of the scored rows."""

    @staticmethod
    def forward(
        ctx: Any, most: int | None, ids: Tensor, temperature: float, bias: Tensor | None, *parts: Tensor
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, log_sums = _forward(most, ids, temperature, bias, list(parts))
        ctx.most, ctx.temperature = most, temperature
        ctx.save_for_backward(ids, entropy, log_sums, bias, *parts)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *by_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "head_logprobs has no second derivative (create_graph=True): use log_softmax(F.linear(...)) instead."
            )
        ids, entropy, log_sums, bias, *parts = ctx.saved_tensors
        gradients = empty_gradients(bias, parts, list(ctx.needs_input_grad[3:]))
        for rows, logits in logit_chunks(bias, parts, ctx.most):
            g, h = (None if values is None else values[rows, None] for values in by_output)
            logit_grads = _logit_grads(
                _scaled(logits, ctx.temperature).sub_(log_sums[rows, None]), ids[rows, None], g, h, entropy[rows, None]
            )
            add_gradients(rows, logit_grads.div_(ctx.temperature), logits, parts, gradients)
            del logit_grads  # before the next chunk needs as much
        dtypes = [None if tensor is None else tensor.dtype for tensor in (bias, *parts)]
        wanted = (None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True))
        return None, None, None, *wanted


def _logit_grads(
    logprobs: Tensor, ids: Tensor, by_logprob: Tensor | None, by_entropy: Tensor | None, entropy: Tensor
) -> Tensor:
    """``g (1[id] - p) - h p (log p + H)``, for gradients ``g`` of log-probabilities and ``h`` of entropies.

    Args:
        logprobs: Log-probabilities of all classes, ``(rows, vocab)``; overwritten.
        ids: ``(rows, 1)``, as are the arguments after it.
        by_logprob: ``g``; None if nothing depends on the log-probabilities.
        by_entropy: ``h``; None if nothing depends on the entropies.
        entropy: ``H``.
    """
    if by_entropy is None:
        assert by_logprob is not None
        grads = logprobs.exp_().mul_(-by_logprob)
    else:
        probabilities = logprobs.exp()
        grads = logprobs.add_(entropy).mul_(-by_entropy)
        grads = (grads if by_logprob is None else grads.sub_(by_logprob)).mul_(probabilities)
    return grads if by_logprob is None else grads.scatter_add_(-1, ids, by_logprob)
