"""Tokens drawn from logits, with their log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_lora.errors import ConfigError
from lightning_lora.tasks.rl.sampling.drawing import draw
from lightning_lora.tasks.rl.sampling.samples import SamplingSettings

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def drawn(settings: SamplingSettings, count: int = 20_000) -> tuple[Tensor, Tensor]:
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(0))
    return draw(LOGITS.expand(count, -1), uniforms, settings)


# Made from -log(sum(exp(logits / T))) with Python's math.
@pytest.mark.parametrize(
    ("settings", "logprob"),
    [
        (SamplingSettings(), -0.4401896986),
        (SamplingSettings(temperature=0.7), -0.2706738307),
        (SamplingSettings(top_p=0.9), -0.4076059644),
        (SamplingSettings(top_k=2), -math.log(1 + math.exp(-1))),
    ],
)
def test_frequencies_are_the_probabilities_told(settings: SamplingSettings, logprob: float) -> None:
    tokens, logprobs = drawn(settings)
    assert logprobs[tokens == 0][0] == pytest.approx(logprob, abs=1e-6)
    for token in tokens.unique():
        share = (tokens == token).float().mean()
        expected = logprobs[tokens == token][0].exp()
        assert share == pytest.approx(float(expected), abs=4 * float((expected * (1 - expected) / 20_000).sqrt()))


@pytest.mark.parametrize(("settings", "kept"), [(SamplingSettings(top_p=0.9), 3), (SamplingSettings(top_k=2), 2)])
def test_what_is_cut_off_is_never_drawn(settings: SamplingSettings, kept: int) -> None:
    assert drawn(settings)[0].unique().tolist() == list(range(kept))


def test_temperature_zero_takes_the_likeliest() -> None:
    tokens, logprobs = draw(LOGITS, torch.tensor([0.99]), SamplingSettings(temperature=0))
    assert tokens.tolist() == [0]
    assert logprobs[0] == pytest.approx(-0.4401896986, abs=1e-6)


@pytest.mark.parametrize("vocabulary", [10, 40_000])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_a_token_without_probability_is_never_drawn(vocabulary: int, uniform: float) -> None:
    logits = torch.full((1, vocabulary), -torch.inf)
    logits[0, 3:6] = torch.tensor([0.1, 1.7, 0.3])
    tokens, logprobs = draw(logits, torch.tensor([uniform]), SamplingSettings())
    assert tokens.item() == (3 if uniform == 0 else 5)
    assert logprobs.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of 1 or more, got 0"),
        ({"top_k": -1}, "top_k must be a whole number of 0 or more, got -1"),
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number of at least 0, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
        ({"stop": "END"}, "stop must be a list of texts that are not empty, got 'END'"),
        ({"stop": ("END", "")}, "stop must be a list of texts that are not empty"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingSettings(**settings)  # type: ignore[arg-type]
