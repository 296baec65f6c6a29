"""What is asked of a sampler and what it returns."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_lora.errors import SamplingSettingError, check_count

_COLDEST = 1e-6
"""The lowest temperature: logits that are divided by less leave the range of float32."""


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn.

    Args:
        max_new_tokens: Tokens of a completion at most; one that gets there is cut off.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Draws from the likeliest tokens that hold this share of the probability.
        stop: Texts that end a completion. They stay in it.
        top_k: Draws from so many of the likeliest tokens; 0 leaves all.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top_k: int = 0

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens, SamplingSettingError)
        check_count("top_k", self.top_k, SamplingSettingError, least=0)
        if not 0 <= self.temperature < math.inf:
            raise SamplingSettingError(f"temperature must be a finite number of at least 0, got {self.temperature}.")
        if 0 < self.temperature < _COLDEST:
            raise SamplingSettingError(
                f"temperature {self.temperature} is too low to divide by: give {_COLDEST} or more, or 0, which takes "
                "the likeliest token."
            )
        if not 0 < self.top_p <= 1:
            raise SamplingSettingError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if isinstance(self.stop, str) or not all(self.stop):
            raise SamplingSettingError(f"stop must be a list of texts that are not empty, got {self.stop!r}.")
        try:
            "".join(self.stop).encode()
        except UnicodeEncodeError as error:
            raise SamplingSettingError(f"stop holds half a character (a lone surrogate): {self.stop!r}.") from error
        object.__setattr__(self, "stop", tuple(self.stop))  # a config gives a list


@dataclasses.dataclass(frozen=True)
class Samples:
    """Completions: ``group_size`` rows of the first prompt, then those of the second, and so on.

    Args:
        tokens: New tokens, the end of a turn among them, ``(rows, width)``, padded on the right.
        logprobs: Natural log-probabilities under the distribution that they were drawn from, ``(rows, width)`` float32;
            0 at padding. Temperature 0 draws nothing; they are then those of temperature 1.
        lengths: Tokens of each row, ``(rows,)``.
        finished: Whether a row ended by itself, ``(rows,)``; False where it was cut off.
        version: Version of the weights, as given to `Sampler.load`.
    """

    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor
    finished: Tensor
    version: int


@runtime_checkable
class Sampler(Protocol):
    """Draws completions from a model that changes as it is trained."""

    def load(self, model: nn.Module, version: int) -> None:
        """Take the present weights; ``version`` counts optimizer steps."""
        ...

    def sample(
        self, prompts: list[Tensor], group_size: int, settings: SamplingSettings, generator: torch.Generator
    ) -> Samples:
        """Draw ``group_size`` completions of each prompt, which are tokens ``(length,)`` without padding."""
        ...
