"""Preference losses against numbers computed once in float64, and checked against the code of TRL and OpenRLHF."""

from __future__ import annotations

import doctest
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import ConfigError
from lightning_lora.tasks.rl.functional.preference_loss import preference_loss, reward_model_loss

LENGTHS = {"chosen_lengths": torch.tensor([5, 4]), "rejected_lengths": torch.tensor([8, 3])}


def pairs() -> list[Tensor]:
    """Log-probabilities of two pairs: chosen, rejected, and the same under the reference."""
    values = [(-10, -12.5), (-14, -9), (-11, -12), (-13, -9.5)]
    return [torch.tensor(value, dtype=torch.float64, requires_grad=number < 2) for number, value in enumerate(values)]


SIGMOID = (0.5981388694, 0.7443966601)
# Settings, the loss of each pair, and the gradient of the mean with respect to chosen and rejected.
ORACLE: dict[str, tuple[dict[str, Any], tuple[float, ...], tuple[float, ...], tuple[float, ...] | None]] = {
    "sigmoid": ({}, SIGMOID, (-0.0225083001, -0.0262489594), None),
    "cDPO": ({"label_smoothing": 0.1}, (0.6181388694, 0.7343966601), (-0.0175083001, -0.0212489594), None),
    "robust": (
        {"kind": "robust", "label_smoothing": 0.1}, (0.5731388694, 0.7568966601), (-0.0287583001, -0.0324989594), None,
    ),
    "hinge": ({"kind": "hinge"}, (0.8, 1.1), (-0.05, -0.05), None),
    "ipo averaged": (
        {"kind": "ipo", **LENGTHS}, (21.855625, 28.0017361111), (-0.935, -1.3229166667), (0.584375, 1.7638888889),
    ),
    "ipo summed": ({"kind": "ipo"}, (9, 36), (-3, -6), None),
    "length normalised, beta 0.1": (
        {"kind": "length_normalised", **LENGTHS}, (0.6770292060, 0.7078368469), (-0.0049187572, -0.0063411394),
        (0.0030742232, 0.0084548525),
    ),
    "length normalised, beta 2": (
        {"kind": "length_normalised", "beta": 2.0, **LENGTHS}, (0.4200553357, 1.0267588388),
        (-0.0685979075, -0.1604585113), (0.0428736922, 0.2139446817),
    ),
    "with the likelihood of the chosen": (
        {"nll_weight": 1.0, **LENGTHS}, (2.5981388694, 3.8693966601), (-0.1225083001, -0.1512489594),
        (0.0225083001, 0.0262489594),
    ),
    "dpop": (
        {"kind": "dpop", "dpop_weight": 5.0}, (0.5981388694, 0.8833821554), (-0.0225083001, -0.1759852737),
        (0.0225083001, 0.0293308789),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "losses", "by_chosen", "by_rejected"), ORACLE.values(), ids=ORACLE)
def test_losses_and_gradients_are_the_published_ones(
    settings: dict[str, Any], losses: Any, by_chosen: Any, by_rejected: Any
) -> None:
    chosen, rejected, *reference = pairs()
    found = preference_loss(chosen, rejected, *reference, **settings)
    assert found.tolist() == pytest.approx(losses, abs=1e-9)
    gradients = torch.autograd.grad(found.mean(), [chosen, rejected])
    expected = by_chosen, [-value for value in by_chosen] if by_rejected is None else by_rejected
    for gradient, values in zip(gradients, expected, strict=True):
        assert gradient.tolist() == pytest.approx(values, abs=1e-9)
    # float32
    singles = [tensor.detach().float() for tensor in (chosen, rejected, *reference)]
    assert preference_loss(*singles, **settings).tolist() == pytest.approx(losses, rel=1e-5)


def test_likelihood_pooled_over_a_batch_as_trl_does() -> None:
    """Not offered: it changes with the division of rows among batches. It is one line on top."""
    chosen, rejected, *reference = pairs()
    pooled = -chosen.sum() / LENGTHS["chosen_lengths"].sum()
    found = preference_loss(chosen, rejected, *reference) + pooled
    assert found.tolist() == pytest.approx((3.0981388694, 3.2443966601), abs=1e-9)
    by_chosen, by_rejected = torch.autograd.grad(found.mean(), [chosen, rejected])
    assert by_chosen.tolist() == pytest.approx((-0.1336194112, -0.1373600705), abs=1e-9)
    assert by_rejected.tolist() == pytest.approx((0.0225083001, 0.0262489594), abs=1e-9)


def test_huge_margins_overflow_nothing() -> None:
    zeros, huge = torch.zeros(2), torch.tensor([1e4, -1e4], requires_grad=True)
    losses = preference_loss(huge, zeros, zeros, zeros, beta=1.0)
    assert losses.tolist() == [0.0, 1e4]
    assert torch.autograd.grad(losses.sum(), huge)[0].tolist() == [0.0, -1.0]
    assert reward_model_loss(huge, zeros).tolist() == [0.0, 1e4]


SCORES = (1.2, -0.3, 0.5), (0.2, 0.4, 0.5)
PLAIN = (0.3132616875, 1.1031860489, 0.6931471806)
CENTRED_BY_REJECTED = (0.0989804738, 0.2233959241, 0.1733333333)
REWARDS: dict[str, tuple[dict[str, Any], float, tuple[float, ...] | None, tuple[float, ...] | None]] = {
    "plain": ({}, 0.7031983057, (-0.0896471405, -0.2227292574, -0.1666666667), None),
    "margin": ({"margin": torch.tensor([0.5, 0, 1], dtype=torch.float64)}, 0.9635082402, None, None),
    "centred": (
        {"centre": 0.01}, 0.7130983057, (-0.0803138071, -0.2220625907, -0.16), CENTRED_BY_REJECTED,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "mean", "by_chosen", "by_rejected"), REWARDS.values(), ids=REWARDS)
def test_reward_losses_and_gradients_are_the_published_ones(
    settings: dict[str, Any], mean: float, by_chosen: Any, by_rejected: Any
) -> None:
    chosen, rejected = (torch.tensor(scores, dtype=torch.float64, requires_grad=True) for scores in SCORES)
    losses = reward_model_loss(chosen, rejected, **settings)
    assert losses.mean().item() == pytest.approx(mean, abs=1e-9)
    gradients = torch.autograd.grad(losses.mean(), [chosen, rejected])
    for gradient, expected in zip(gradients, (by_chosen, by_rejected), strict=True):
        if expected is not None:
            assert gradient.tolist() == pytest.approx(expected, abs=1e-9)


def test_reward_losses_of_each_pair() -> None:
    chosen, rejected = (torch.tensor(scores, dtype=torch.float64) for scores in SCORES)
    assert reward_model_loss(chosen, rejected).tolist() == pytest.approx(PLAIN, abs=1e-9)
    with_margin = reward_model_loss(chosen, rejected, margin=torch.tensor([0.5, 0, 1]))
    assert with_margin.tolist() == pytest.approx((0.4740769842, 1.1031860489, 1.3132616875), abs=1e-9)


BAD = {
    "kind": ({"kind": "sigmod"}, "loss must be one of .* got 'sigmod'; did you mean 'sigmoid'"),
    "beta": ({"beta": 0.0}, "beta must be above 0, got 0.0"),
    "beta is no number": ({"beta": math.nan}, "beta must be above 0, got nan"),
    "smoothing": ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, got 0.5"),
    "smoothing without meaning": ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing has no meaning in loss"),
    "lengths": ({"kind": "length_normalised"}, "length_normalised needs the numbers of tokens: give chosen_lengths"),
    "lengths of the chosen": ({"nll_weight": 1.0}, "nll_weight needs the numbers of tokens"),
    "negative": ({"nll_weight": -1.0}, "nll_weight must be at least 0, got -1.0"),
    "negative dpop": ({"dpop_weight": -1.0}, "dpop_weight must be at least 0, got -1.0"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preference_loss(*pairs(), **settings)


def test_the_example_runs() -> None:
    failed, tried = doctest.testmod(importlib.import_module("lightning_lora.tasks.rl.functional.preference_loss"))
    assert tried
    assert not failed
