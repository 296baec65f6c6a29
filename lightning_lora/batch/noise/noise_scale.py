r"""How much of a gradient is noise: ``B_simple = tr(Sigma) / |G|^2`` in rows, from micro-batches, with an interval.

``G`` is the gradient over all data, ``Sigma`` the covariance of the gradient of one row. A mean over ``b`` rows has
covariance ``Sigma / b``, so its expected square norm is ``|G|^2 + tr(Sigma) / b``: two batch sizes tell both terms.
A step of ``K`` independent micro-batches holds two, one of them and all of them.

Averages over steps are taken of numerator and denominator, never of their ratio, and negative values stay in: both
estimates are unbiased only so. Whoever clamps or divides first finds a noise scale of the wrong size and sign.

References:
    McCandlish et al., *An Empirical Model of Large-Batch Training*, 2018, appendix A, https://arxiv.org/abs/1812.06162
    Efron and Stein, *The Jackknife Estimate of Variance*, 1981, for the interval of a single step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.errors import DataError

# Two-sided 95 % of a normal distribution.
_Z = 1.959964
# Below this many standard errors of |G|^2 above zero the ratio has no useful interval.
_MIN_SIGNAL = 2.0


@dataclass(frozen=True)
class NoiseScale:
    """An estimate of the noise scale, or the statement that there is none.

    Args:
        value: ``trace / signal``, rows. Meaningless, and possibly negative, while not ``conclusive``.
        low: Lower end of the 95 % interval, rows; minus infinity where there is none.
        high: Upper end; infinity where there is none.
        signal: Estimate of ``|G|^2``, squared units of the gradient; may be negative.
        trace: Estimate of ``tr(Sigma)`` of one row, the same units; may be negative.
        conclusive: Whether the signal is two standard errors above zero.
    """

    value: float
    low: float
    high: float
    signal: float
    trace: float
    conclusive: bool


def noise_scale(gradients: Tensor | Sequence[Tensor], batch_sizes: int | Sequence[int] | Tensor) -> NoiseScale:
    """The noise scale that one step shows: ``K`` gradients of independent micro-batches, each a mean over its rows.

    The interval is the delta method over jackknife pseudo-values, which assumes no distribution; with two
    micro-batches there is none, and the result is inconclusive. Many steps are combined by `combine`.

    Args:
        gradients: ``K`` vectors of ``D`` entries, or a ``(K, D)`` tensor.
        batch_sizes: Rows in each micro-batch: one number, or ``K``.

    Raises:
        DataError: If there are fewer than two micro-batches, shapes differ, or a batch size is not positive.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> noise = torch.randn(256, 50, generator=generator)  # tr(Sigma) = 50 rows of unit variance
        >>> estimate = noise_scale(1 + noise, batch_sizes=1)  # |G|^2 = 50
        >>> estimate.conclusive, estimate.low < 1 < estimate.high
        (True, True)
    """
    if not isinstance(gradients, Tensor):
        if len({gradient.shape for gradient in gradients}) > 1:
            raise DataError("the gradients of the micro-batches differ in shape.")
        gradients = torch.stack([gradient.reshape(-1) for gradient in gradients]) if gradients else torch.empty(0, 0)
    rows = gradients.detach().double().flatten(1)
    sizes = _sizes(batch_sizes, len(rows))
    gram = rows @ rows.T
    weights = sizes / sizes.sum()
    inner = gram @ weights
    squares, mean_square = gram.diagonal(), weights @ inner
    signal, trace = signal_and_trace(squares, mean_square, sizes)
    count = len(rows)
    if count == 2:
        return _estimate(float(signal), float(trace), math.nan, math.nan)
    # Everything without the i-th micro-batch follows from the same Gram matrix.
    kept = ~torch.eye(count, dtype=torch.bool, device=rows.device)
    fewer = torch.stack([squares[keep] for keep in kept])
    mean_squares = (mean_square - 2 * weights * inner + weights.square() * squares) / (1 - weights).square()
    without = signal_and_trace(fewer, mean_squares, torch.stack([sizes[keep] for keep in kept]))
    signals, traces = (count * whole - (count - 1) * part for whole, part in zip((signal, trace), without, strict=True))
    equal = torch.full_like(signals, 1 / count)
    return _estimate(float(signal), float(trace), *_errors(signals, traces, equal, signal, trace))


def signal_and_trace(
    squares: Tensor,
    mean_square: Tensor,
    batch_sizes: int | Sequence[int] | Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Unbiased ``|G|^2`` and ``tr(Sigma)`` of a step from square norms alone.

    With weights ``w_k`` that sum to one, ``S = sum w_k |g_k|^2`` and ``M = |sum w_k g_k|^2``:
    ``tr(Sigma) = (S - M) / (sum w_k / b_k - sum w_k^2 / b_k)`` and ``|G|^2 = S - tr(Sigma) sum w_k / b_k``. For equal
    sizes this is McCandlish's estimator; a mean of the sizes in their place would be biased. No distribution is
    assumed, only independence. Any quadratic form may take the place of the square norm (`adam_metric`,
    `curvature_along`).

    Args:
        squares: ``(*, K)``, ``|g_k|^2`` of each micro-batch.
        mean_square: ``(*)``, ``M``, the square norm of the weighted mean.
        batch_sizes: Rows in each micro-batch: one number, or ``(*, K)``.
        weights: ``(*, K)``, ``w_k`` up to a factor. None: by rows, the mean over all rows of the step.

    Returns:
        ``(*)`` each.

    Raises:
        DataError: If ``K < 2`` or a batch size is not positive.
    """
    sizes = _sizes(batch_sizes, squares.shape[-1]).to(squares.device)
    weights = sizes if weights is None else weights.double()
    weights = weights / weights.sum(-1, keepdim=True)
    mean_of_squares = (weights * squares).sum(-1)
    one, all_of_them = (weights / sizes).sum(-1), (weights.square() / sizes).sum(-1)
    trace = (mean_of_squares - mean_square) / (one - all_of_them)
    return mean_of_squares - trace * one, trace


def combine(signals: Tensor, traces: Tensor, weights: Tensor | None = None) -> NoiseScale:
    """The noise scale of many steps: weighted mean of the traces over that of the signals.

    The interval is that of the delta method, ``se(R) = sd(trace_t - R signal_t) / (|mean signal| sqrt(n))`` with
    ``n = (sum w)^2 / sum w^2``; steps are taken as independent.

    Args:
        signals: ``(n,)``, from `signal_and_trace` of each step, negative ones too.
        traces: ``(n,)``.
        weights: ``(n,)``, how much each step counts, such as a power of a half-life. None: all the same.

    Raises:
        DataError: If there is no step, or the numbers differ.
    """
    weights = torch.ones_like(signals) if weights is None else weights
    if not signals.shape == traces.shape == weights.shape or signals.dim() != 1 or not len(signals):
        raise DataError(
            f"a noise scale needs one signal, one trace and one weight of every step, got {tuple(signals.shape)}, "
            f"{tuple(traces.shape)} and {tuple(weights.shape)}."
        )
    signals, traces, weights = signals.double(), traces.double(), weights.double() / weights.sum()
    signal, trace = weights @ signals, weights @ traces
    return _estimate(float(signal), float(trace), *_errors(signals, traces, weights, signal, trace))


def _errors(signals: Tensor, traces: Tensor, weights: Tensor, signal: Tensor, trace: Tensor) -> tuple[float, float]:
    """Standard errors of the mean signal and of the ratio."""
    count = 1 / weights.square().sum()
    if len(signals) < 2:
        return math.nan, math.nan
    of_signal, of_ratio = (
        (weights @ (deviations - weights @ deviations).square() / (count - 1)).sqrt()
        for deviations in (signals, traces - trace / signal * signals)
    )
    return float(of_signal), float(of_ratio / signal.abs())


def _estimate(signal: float, trace: float, signal_error: float, ratio_error: float) -> NoiseScale:
    value = trace / signal if signal else math.nan
    # Comparisons with NaN, an unknown error, are False.
    if not signal >= _MIN_SIGNAL * signal_error:
        return NoiseScale(value, -math.inf, math.inf, signal, trace, conclusive=False)
    return NoiseScale(value, value - _Z * ratio_error, value + _Z * ratio_error, signal, trace, conclusive=True)


def _sizes(batch_sizes: int | Sequence[int] | Tensor, count: int) -> Tensor:
    sizes = torch.as_tensor(batch_sizes, dtype=torch.float64)
    sizes = sizes.expand(count) if sizes.dim() == 0 else sizes
    if count < 2:
        raise DataError(f"a noise scale needs two micro-batches at least, got {count}.")
    if sizes.shape[-1] != count:
        raise DataError(f"got {count} micro-batches and {sizes.shape[-1]} batch sizes.")
    if not bool((sizes > 0).all()):
        raise DataError(f"batch sizes must be positive, got {sizes.tolist()}.")
    return sizes
