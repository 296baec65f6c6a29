r"""The gradient noise scale ``B_simple = tr(Sigma) / |G|^2`` in rows, estimated from micro-batches, with an interval.

``G`` is the gradient over all data, ``Sigma`` the covariance of the gradient of one row. A mean over ``b`` rows has
covariance ``Sigma / b``, so its expected square norm is ``|G|^2 + tr(Sigma) / b``. Gradients of two batch sizes give
both terms. A step of ``K`` independent micro-batches has two: a single micro-batch, and all of them.

Numerator and denominator are averaged over steps separately and divided last, and negative values are kept. Both are
needed for unbiased estimates: clamping, or averaging ratios, gives a noise scale of the wrong size.

References:
    McCandlish et al., *An Empirical Model of Large-Batch Training*, 2018, appendix A, https://arxiv.org/abs/1812.06162
    Efron and Stein, *The Jackknife Estimate of Variance*, 1981 (the interval of a single step)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.errors import GradientError, ResultFileError, check_arguments, first_five

# Two-sided 95 % of a normal distribution.
_Z = 1.959964
# Below this many standard errors of |G|^2 above zero the ratio has no useful interval.
_MIN_SIGNAL = 2.0


@dataclass(frozen=True)
class NoiseScale:
    """An estimate of the gradient noise scale.

    Args:
        value: ``trace / signal``, rows. Meaningless, and possibly negative, unless ``conclusive``.
        low: Lower end of the 95 % interval, rows; minus infinity if unknown.
        high: Upper end of the 95 % interval, rows; infinity if unknown.
        signal: Estimate of ``|G|^2``, squared units of the gradient; may be negative.
        trace: Estimate of ``tr(Sigma)`` of one row, in the units of ``signal``; may be negative.
        conclusive: Whether the signal is at least two standard errors above zero.
    """

    value: float
    low: float
    high: float
    signal: float
    trace: float
    conclusive: bool


def noise_scale(gradients: Tensor | Sequence[Tensor], batch_sizes: int | Sequence[int] | Tensor) -> NoiseScale:
    """Estimate the noise scale from one step: ``K`` gradients of independent micro-batches, each a mean over its rows.

    The interval comes from the delta method over jackknife pseudo-values, which assumes no distribution. Two
    micro-batches give no interval, and the result is inconclusive. `noise_scale_of_steps` averages over many steps.

    Args:
        gradients: ``K`` vectors of ``D`` entries, or a ``(K, D)`` tensor.
        batch_sizes: Rows of each micro-batch: one number, or ``K`` numbers.

    Raises:
        ConfigError: If an argument is of another type.
        DataError: If there are fewer than two micro-batches, shapes differ, or a batch size is not positive.
        GradientError: If a gradient is NaN or infinite.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> noise = torch.randn(256, 50, generator=generator)  # tr(Sigma) = 50 rows of unit variance
        >>> estimate = noise_scale(1 + noise, batch_sizes=1)  # |G|^2 = 50
        >>> estimate.conclusive, estimate.low < 1 < estimate.high
        (True, True)
    """
    check_arguments(noise_scale, locals())
    if not isinstance(gradients, Tensor):
        if len({gradient.shape for gradient in gradients}) > 1:
            raise ResultFileError("the gradients of the micro-batches differ in shape.")
        gradients = torch.stack([gradient.reshape(-1) for gradient in gradients]) if gradients else torch.empty(0, 0)
    rows = gradients.detach().double().flatten(1)
    if odd := (~rows.isfinite().all(1)).nonzero().flatten().tolist():
        raise GradientError(f"gradients of micro-batches {first_five(map(str, odd))} (from 0) are NaN or infinite.")
    sizes = _sizes(batch_sizes, len(rows))
    gram = rows @ rows.T
    weights = sizes / sizes.sum()
    inner = gram @ weights
    squares, mean_square = gram.diagonal(), weights @ inner
    signal, trace = signal_and_trace(squares, mean_square, sizes)
    count = len(rows)
    if count == 2:
        return _estimate(float(signal), float(trace), math.nan, math.nan)
    # The estimates without the i-th micro-batch follow from the same Gram matrix.
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
    sizes this is McCandlish's estimator; using the mean size for unequal ones would be biased. Micro-batches must be
    independent; no distribution is assumed. Any quadratic form may replace the square norm (see `adam_metric`).

    Args:
        squares: ``(*, K)``, ``|g_k|^2`` of each micro-batch.
        mean_square: ``(*)``, ``M``, the square norm of the weighted mean.
        batch_sizes: Rows of each micro-batch: one number, or ``(*, K)``.
        weights: ``(*, K)``, ``w_k`` up to a factor. None weighs by rows: the mean over all rows of the step.

    Returns:
        Signal and trace, each of shape ``(*)``.

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


def noise_scale_of_steps(signals: Tensor, traces: Tensor, weights: Tensor | None = None) -> NoiseScale:
    """Estimate the noise scale from many steps: weighted mean of the traces over weighted mean of the signals.

    The interval comes from the delta method, ``se(R) = sd(trace_t - R signal_t) / (|mean signal| sqrt(n))`` with
    ``n = (sum w)^2 / sum w^2``. Steps are assumed independent.

    Args:
        signals: ``(n,)``, the signal of each step from `signal_and_trace`, negative ones included.
        traces: ``(n,)``, the trace of each step.
        weights: ``(n,)``, the weight of each step, such as ``0.5 ** age``. None weighs all steps equally.

    Raises:
        DataError: If there is no step, or the three shapes differ.
    """
    weights = torch.ones_like(signals) if weights is None else weights
    if not signals.shape == traces.shape == weights.shape or signals.dim() != 1 or not len(signals):
        raise ResultFileError(
            f"a noise scale needs one signal, one trace and one weight for every step, got shapes "
            f"{tuple(signals.shape)}, {tuple(traces.shape)} and {tuple(weights.shape)}."
        )
    signals, traces, weights = signals.double(), traces.double(), weights.double() / weights.sum()
    signal, trace = weights @ signals, weights @ traces
    return _estimate(float(signal), float(trace), *_errors(signals, traces, weights, signal, trace))


def _errors(signals: Tensor, traces: Tensor, weights: Tensor, signal: Tensor, trace: Tensor) -> tuple[float, float]:
    """Standard errors of the mean signal and of the noise scale; NaN for a single sample."""
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
    # A comparison with NaN, the unknown error, is False.
    if not signal >= _MIN_SIGNAL * signal_error:
        return NoiseScale(value, -math.inf, math.inf, signal, trace, conclusive=False)
    return NoiseScale(value, value - _Z * ratio_error, value + _Z * ratio_error, signal, trace, conclusive=True)


def _sizes(batch_sizes: int | Sequence[int] | Tensor, count: int) -> Tensor:
    sizes = torch.as_tensor(batch_sizes, dtype=torch.float64)
    sizes = sizes.expand(count) if sizes.dim() == 0 else sizes
    if count < 2:
        raise ResultFileError(f"a noise scale needs at least two micro-batches, got {count}.")
    if sizes.shape[-1] != count:
        raise ResultFileError(f"got {count} micro-batches and {sizes.shape[-1]} batch sizes.")
    if not bool((sizes > 0).all()):
        raise ResultFileError(f"batch sizes must be positive, got {sizes.tolist()}.")
    return sizes
