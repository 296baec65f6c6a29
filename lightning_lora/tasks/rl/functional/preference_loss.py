"""Losses of pairs of which one is preferred: DPO and its relatives on log-probabilities, Bradley-Terry on scores."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_lora.errors import PolicySettingError, check_choice

KINDS = ("sigmoid", "ipo", "hinge", "robust", "length_normalised", "dpop")
_SMOOTHED = ("sigmoid", "robust", "length_normalised", "dpop")


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    dpop_weight: float = 50.0,
    nll_weight: float = 0.0,
) -> Tensor:
    r"""The loss of each pair, in nats, from log-probabilities summed over the tokens of a completion.

    With ``c = chosen - ref_chosen``, ``r = rejected - ref_rejected``, ``d = c - r`` and ``b = beta``:

    - ``"sigmoid"``: ``-log sigmoid(b d)`` (DPO). With smoothing ``e`` (cDPO): ``-(1-e) log sigmoid(b d) - e log
      sigmoid(-b d)``.
    - ``"robust"``: ``(-(1-e) log sigmoid(b d) + e log sigmoid(-b d)) / (1-2e)``; unbiased if a share ``e`` of the
      labels is wrong. It may be negative.
    - ``"hinge"``: ``max(0, 1 - b d)``.
    - ``"ipo"``: ``(d - 1/(2b))^2``. With lengths, ``c`` and ``r`` are divided by them first, as its authors do; the
      same ``b`` then means a much stronger pull.
    - ``"length_normalised"``: the sigmoid loss of ``c`` and ``r`` divided by their lengths. It needs a ``b`` of 2 to 5.
    - ``"dpop"``: ``-log sigmoid(b (d - l max(0, -c)))``: a chosen completion that gets less likely costs ``l`` times.

    Args:
        chosen: Log-probabilities of the chosen completions, ``(pairs,)``, nats.
        rejected: Log-probabilities of the rejected completions, ``(pairs,)``.
        ref_chosen: Log-probabilities of the chosen completions under the reference, ``(pairs,)``.
        ref_rejected: Log-probabilities of the rejected completions under the reference, ``(pairs,)``.
        kind: The loss.
        beta: Strength of the pull to the reference, above 0; larger stays nearer.
        label_smoothing: Share ``e`` of pairs taken to be labelled the wrong way round, at least 0 and below 0.5.
        chosen_lengths: Tokens of the chosen completions, ``(pairs,)``. ``"length_normalised"`` and ``nll_weight`` need
            them; None sums in ``"ipo"``.
        rejected_lengths: Tokens of the rejected completions, ``(pairs,)``.
        dpop_weight: ``l`` of ``"dpop"``, at least 0.
        nll_weight: Adds so much of the chosen completion's negative log-likelihood per token, at least 0.

    Raises:
        ConfigError: If a setting is out of its range, or lengths are missing.

    Example:
        >>> import torch
        >>> zeros = torch.zeros(2)
        >>> preference_loss(zeros, zeros, zeros, zeros)  # log 2: nothing is preferred yet
        tensor([0.6931, 0.6931])

    References:
        DPO: Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, equation 7. IPO: Azar et al., 2023,
        https://arxiv.org/abs/2310.12036, equation 17. Robust: Chowdhury et al., 2024, https://arxiv.org/abs/2403.00409.
        DPOP: Pal et al., 2024, https://arxiv.org/abs/2402.13228. NLL term: Pang et al., 2024,
        https://arxiv.org/abs/2404.19733.
    """
    check_preference_settings(kind, beta, label_smoothing, dpop_weight, nll_weight)
    gain, other_gain = chosen - ref_chosen, rejected - ref_rejected
    if kind == "length_normalised" or (kind == "ipo" and chosen_lengths is not None):
        gain = gain / _needed(chosen_lengths, kind)
        other_gain = other_gain / _needed(rejected_lengths, kind)
    margin = gain - other_gain
    if kind == "dpop":
        margin = margin - dpop_weight * F.relu(-gain)
    if kind == "ipo":
        losses = (margin - 1 / (2 * beta)).square()
    elif kind == "hinge":
        losses = F.relu(1 - beta * margin)
    else:
        right, wrong = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
        # A wrong label counts for the other order, or, in the robust loss, is subtracted to undo what it adds.
        sign = -1 if kind == "robust" else 1
        losses = (1 - label_smoothing) * right + sign * label_smoothing * wrong
        losses = losses / (1 - 2 * label_smoothing) if kind == "robust" else losses
    return losses - nll_weight * chosen / _needed(chosen_lengths, "nll_weight") if nll_weight else losses


def reward_model_loss(chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, centre: float = 0.0) -> Tensor:
    r"""``-log sigmoid(chosen - rejected - margin) + centre (chosen + rejected)^2`` of each pair, ``(pairs,)``, nats.

    Args:
        chosen: Scores of the chosen completions, ``(pairs,)``.
        rejected: Scores of the rejected completions, ``(pairs,)``.
        margin: What the chosen score should be ahead by, ``(pairs,)`` or one number.
        centre: Weight of the pull of scores to a mean of 0, at least 0. The paper's is 0.01.

    References:
        Eisenstein et al., 2023, https://arxiv.org/abs/2312.09244 (centring).
    """
    losses = -F.logsigmoid(chosen - rejected - margin)
    return losses + centre * (chosen + rejected).square() if centre else losses


def check_preference_settings(
    kind: str, beta: float, label_smoothing: float, dpop_weight: float = 50.0, nll_weight: float = 0.0
) -> None:
    """Check the settings of `preference_loss`.

    Raises:
        ConfigError: If one is out of its range.
    """
    check_choice("loss", kind, KINDS)
    if not beta > 0:
        raise PolicySettingError(f"beta must be above 0, got {beta!r}: at 0 no pair would have a gradient.")
    if not 0 <= label_smoothing < 0.5:
        raise PolicySettingError(f"label_smoothing must be at least 0 and below 0.5, got {label_smoothing!r}.")
    if label_smoothing and kind not in _SMOOTHED:
        raise PolicySettingError(f"label_smoothing has no meaning in loss {kind!r}: use one of {', '.join(_SMOOTHED)}.")
    for name, value in {"dpop_weight": dpop_weight, "nll_weight": nll_weight}.items():
        if not value >= 0:
            raise PolicySettingError(f"{name} must be at least 0, got {value!r}.")


def _needed(lengths: Tensor | None, what: str) -> Tensor:
    if lengths is None:
        raise PolicySettingError(f"{what} needs the numbers of tokens: give chosen_lengths and rejected_lengths.")
    return lengths
