"""One architecture of the table: how it is built, what it is fed, and what LoRA must leave alone in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 64
PEFT_LOADS = "yes"

# What `left_out` says, in one wording each.
TABLE = "embedding table"
POSITIONS = "position table"
PATCHES = "embeds patches of the input"
HEAD = "output head"
TIED = "output head, tied to the embedding"
ROUTER = "router"
UNCALLED = "read without being called"

# What `save_adapter` warns of.
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
    """A model of milliseconds with random weights.

    Args:
        name: As people call it.
        family: Dense decoder, mixture of experts, encoder, ...
        build: Makes the same weights each time, in eval mode and float32.
        inputs: Keyword arguments of ``output``, enough rows that every expert is chosen.
        output: Model and inputs to the tensor that must not change under saving and merging.
        left_out: Glob over parameter names -> why ``targets="all"`` leaves these weights alone.
        exclude: Name pattern of a layer that cannot be adapted -> why; passed to the config.
        trainable: Name patterns of what is trained in full beside the adapters, as new heads are.
        peft: ``"yes"`` where `peft.PeftModel.from_pretrained` loads the saved folder, else why it cannot.
        save_warns: What `save_adapter` warns of, a regular expression; None where it says nothing.
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
    """``build`` from a fixed seed, in eval mode, with the caller's random state left alone."""

    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build().eval()

    return made


def hugging_face(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A transformers model of this class and settings."""
    return seeded(lambda: getattr(transformers, model)(getattr(transformers, config)(**settings)))


def tokens(name: str = "input_ids", rows: int = 3, length: int = 10, **others: Callable[[], Tensor]) -> Any:
    """Token ids that avoid the special ones, the same each time."""

    def made() -> dict[str, Tensor]:
        ids = 4 + (torch.arange(rows * length).reshape(rows, length) * 7) % (VOCAB - 4)
        return {name: ids} | {other: build() for other, build in others.items()}

    return made


def noise(*shape: int, name: str = "x", seed: int = 0) -> Callable[[], dict[str, Tensor]]:
    """Normal numbers of this shape, the same each time."""

    def made() -> dict[str, Tensor]:
        return {name: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))}

    return made
