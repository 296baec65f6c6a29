"""One architecture of the table: how to build it, its inputs, and what LoRA must leave alone in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 64
PEFT_LOADS = "yes"

# The reasons in `left_out`.
TABLE = "embedding table"
POSITIONS = "position table"
PATCHES = "embeds patches of the input"
HEAD = "output head"
TIED = "output head, tied to the embedding"
ROUTER = "router"
UNCALLED = "read without being called"

# Warnings of `save_adapter`.
NO_EQUAL = "PEFT cannot load this adapter"
HALVED = "adds the update of .* twice .* so it is written halved"

Outputs = Callable[..., Tensor]


def logits(model: Any, **inputs: Tensor) -> Tensor:
    return model(**inputs).logits


def hidden(model: Any, **inputs: Tensor) -> Tensor:
    return model(**inputs).last_hidden_state


def called(model: Any, **inputs: Tensor) -> Tensor:
    return model(*inputs.values())


@dataclass(frozen=True)
class Architecture:
    """A tiny model with random weights.

    Args:
        name: Common name of the architecture.
        family: Dense decoder, mixture of experts, encoder, ...
        build: Builds the model, with the same weights each time, in eval mode and float32.
        inputs: Builds the keyword arguments of ``output``, with enough rows that every expert is chosen.
        output: Computes the tensor that saving and merging must not change, from the model and the inputs.
        left_out: Glob over parameter names to the reason why ``targets="all"`` leaves these weights alone.
        exclude: Name pattern of a layer that cannot be adapted to the reason; passed to the config.
        trainable: Name patterns of modules trained in full beside the adapters, such as new heads.
        peft: ``"yes"`` if `peft.PeftModel.from_pretrained` loads the saved folder, or else why it cannot.
        save_warns: Regular expression of the warning of `save_adapter`; None if it does not warn.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    output: Outputs = logits
    left_out: dict[str, str] = field(default_factory=dict)
    exclude: dict[str, str] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()
    peft: str = PEFT_LOADS
    save_warns: str | None = None


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Wrap ``build`` so that it starts from a fixed seed, gives eval mode and keeps the caller's random state."""

    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build().eval()

    return made


def hugging_face(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A builder of a transformers model with this class, config class and settings."""
    return seeded(lambda: getattr(transformers, model)(getattr(transformers, config)(**settings)))


def tokens(name: str = "input_ids", rows: int = 3, length: int = 10, **others: Callable[[], Tensor]) -> Any:
    """A builder of token ids without special ones, the same each time."""

    def made() -> dict[str, Tensor]:
        ids = 4 + (torch.arange(rows * length).reshape(rows, length) * 7) % (VOCAB - 4)
        return {name: ids} | {other: build() for other, build in others.items()}

    return made


def noise(*shape: int, name: str = "x", seed: int = 0) -> Callable[[], dict[str, Tensor]]:
    """A builder of normally distributed numbers of this shape, the same each time."""

    def made() -> dict[str, Tensor]:
        return {name: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))}

    return made
