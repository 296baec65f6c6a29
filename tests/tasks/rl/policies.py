"""Tiny policies: prompts, rewards, and a sampler that needs nothing but a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig
from lightning_lora.tasks import PolicyGradient
from lightning_lora.tasks.rl.sampling.samples import Samples, SamplingSettings
from tests.support import toys

# Random models rarely end their turn in time.
EXPECTED = [*toys.expected_warnings, pytest.mark.filterwarnings("ignore:.*completions were cut off at")]

END = 2
"""The token that ends a turn in the tokenizer of `toys.save_llama`."""


class PlainSampler:
    """Reads all tokens again for each new one; every rank makes as many passes, whatever it draws.

    Args:
        end: The token that ends a completion.
        shift: Added to the log-probabilities that it tells.
    """

    def __init__(self, end: int = END, shift: float = 0.0) -> None:
        self.end, self.shift = end, shift
        self.versions: list[int] = []
        self.model: Any = None

    def load(self, model: nn.Module, version: int) -> None:
        self.model = model
        self.versions.append(version)

    def sample(
        self, prompts: list[Tensor], group_size: int, settings: SamplingSettings, generator: torch.Generator
    ) -> Samples:
        rows = [self._row(prompt, settings, generator) for prompt in prompts for _ in range(group_size)]
        tokens, logprobs, lengths, finished = zip(*rows, strict=True)
        return Samples(
            torch.stack(tokens), torch.stack(logprobs), torch.tensor(lengths), torch.tensor(finished), self.versions[-1]
        )

    def _row(
        self, prompt: Tensor, settings: SamplingSettings, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, int, bool]:
        ids, logprobs, length = prompt, [], None
        for step in range(settings.max_new_tokens):
            logits = self.model(input_ids=ids[None]).logits[0, -1].float()
            drawn = (logits / (settings.temperature or 1)).log_softmax(-1)
            token = (
                torch.multinomial(drawn.exp(), 1, generator=generator) if settings.temperature else drawn.argmax()[None]
            )
            logprobs.append(drawn[token] + self.shift)
            ids = torch.cat([ids, token])
            if length is None and int(token) == self.end:
                length = step + 1
        tokens, told = ids[len(prompt) :], torch.cat(logprobs)
        length, finished = length or len(tokens), length is not None
        return tokens, told.masked_fill(torch.arange(len(told)) >= length, 0), length, finished


def count_letters(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    """A reward that any policy earns a part of: the share of the characters that are in the first half of ASCII."""
    return [sum(ord(c) < 100 for c in text) / max(1, len(text)) for text in completions]


def nothing(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    """A reward that nobody gets."""
    return [0.0 for _ in completions]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "input_ids": [row["input_ids"] for row in rows],
        "prompts": [row["prompt"] for row in rows],
        "columns": {"answer": [row["answer"] for row in rows]},
    }


def prompt_loader(count: int = 8, batch_size: int = 2, **options: Any) -> DataLoader[Any]:
    """Prompts of different lengths, in an order that is drawn anew for each epoch."""
    rows = [
        {"input_ids": 6 + (torch.arange(2 + number % 3) * 7 + number) % 200, "prompt": f"p{number}", "answer": number}
        for number in range(count)
    ]
    settings: dict[str, Any] = {"shuffle": True} | options
    return DataLoader(rows, batch_size=batch_size, collate_fn=collate, **settings)  # pyright: ignore[reportArgumentType]


def make(folder: Path, reward: Callable[..., Any] = count_letters, **options: Any) -> PolicyGradient:
    settings: dict[str, Any] = {"learning_rate": 1e-3, "lora": LoRAConfig(rank=2), "group_size": 4}
    settings |= {"max_new_tokens": 5, "reward_workers": 0}
    if "sampler" not in options:
        settings["sampler"] = PlainSampler()
    return PolicyGradient(str(folder), reward=reward, **(settings | options))


def fit(module: PolicyGradient, folder: Path, **options: Any) -> Trainer:
    loader, validation = options.pop("loader", None), options.pop("validation", None)
    ckpt_path = options.pop("ckpt_path", None)
    runner = toys.trainer(folder, **({"max_epochs": -1 if "max_steps" in options else 1} | options))
    prompts = prompt_loader() if loader is None else loader
    runner.fit(module, prompts, validation, ckpt_path=ckpt_path, weights_only=True)
    return runner


def coin(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    """A reward of 0 or 1 that depends on the completion."""
    return [float(len(text) % 2) for text in completions]


def trained(module: nn.Module) -> list[Tensor]:
    """Copies of what is trained; of a model that is not loaded yet, what it starts from."""
    return [parameter.detach().clone() for parameter in module.parameters() if parameter.requires_grad]
