"""Tasks on digits that a reward can check. A tiny model learns them in part before rewards begin."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_lora.tasks.rl.sampling.in_process import InProcessSampler
from lightning_lora.tasks.rl.sampling.samples import SamplingSettings

HELD_OUT = 512
"""Questions that no run trains on, and all are evaluated on."""
PAD, END, ASK = 10, 11, 12
"""The padding, the end of an answer, and the sign between question and answer; digits are their own ids."""
VOCABULARY = 16
WARM_SHARE = 0.3
"""Sampled accuracy at which the warm start ends."""


@dataclass(frozen=True)
class DigitTask:
    """What is asked of a string of digits.

    Args:
        digits: Length of a question.
        answer: The digits that are right for a question, as many for each.
    """

    digits: int
    answer: Callable[[str], str]

    @property
    def answer_tokens(self) -> int:
        """The digits of an answer and the token that ends it."""
        return len(self.answer("0" * self.digits)) + 1

    def questions(self, count: int, seed: int) -> list[str]:
        """Different strings of digits."""
        generator = random.Random(seed)
        return [f"{number:0{self.digits}d}" for number in generator.sample(range(10**self.digits), count)]

    def reward(self, prompts: Sequence[str], completions: Sequence[str], control: Sequence[str]) -> list[float]:
        """1 for an answer that is right in every digit and 0 for any other, unless a control says otherwise.

        Args:
            prompts: Questions.
            completions: Answers.
            control: The same word for each row: ``none``; ``zero`` gives nobody anything, ``shuffled`` gives each
                reward to another answer of the batch.
        """
        pairs = zip(prompts, completions, strict=True)
        rewards = [float(completion == self.answer(prompt)) for prompt, completion in pairs]
        if control[0] == "zero":
            return [0.0] * len(rewards)
        if control[0] == "shuffled":
            random.Random(repr(completions)).shuffle(rewards)
        return rewards

    def example_loader(self, rows: Sequence[str], batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        """Batches of questions with their answers, for supervised fine-tuning."""
        return DataLoader(rows, batch_size=batch_size, shuffle=shuffle, collate_fn=self.examples)  # pyright: ignore[reportArgumentType]

    def examples(self, rows: Sequence[str]) -> dict[str, Tensor]:
        """A batch of questions with their answers; only answers have labels."""
        ids = torch.stack([torch.cat([prompt_ids(row), self.answer_ids(row)]) for row in rows])
        labels = ids.clone()
        labels[:, : self.digits + 1] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def answer_ids(self, question: str) -> Tensor:
        """The tokens of the right answer, with its end."""
        return torch.tensor([*map(int, self.answer(question)), END])


TASKS = {
    "sort": DigitTask(6, lambda question: "".join(sorted(question))),
    "reverse": DigitTask(6, lambda question: question[::-1]),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character."""
    names = [*map(str, range(10)), "<pad>", "<end>", ">", "<unk>"]
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    backend.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def prompt_ids(question: str) -> Tensor:
    """The tokens of a question and of the sign after it."""
    return torch.tensor([*map(int, question), ASK])


def prompt_loader(
    rows: Sequence[str], batch_size: int, shuffle: bool = False, control: str = "none"
) -> DataLoader[Any]:
    """Batches of prompts for a policy, with the control of their `reward`."""
    collate = partial(_prompts, control=control)
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle, collate_fn=collate)  # pyright: ignore[reportArgumentType]


def _prompts(rows: Sequence[str], control: str) -> dict[str, Any]:
    columns = {"control": [control] * len(rows)}
    return {"input_ids": [prompt_ids(row) for row in rows], "prompts": list(rows), "columns": columns}


def warm_model(task: DigitTask, folder: Path, seed: int, held_out: Sequence[str]) -> float:
    """Train a small llama on examples until it samples `WARM_SHARE` of the answers right, and write it to ``folder``.

    Returns:
        The share that it samples right.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    share, step = 0.0, 0
    for step, batch in enumerate(_endless(task, seed), 1):
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 and (share := accuracy(task, model, held_out, seed)) >= WARM_SHARE:
            break
        if step == 500:
            raise RuntimeError(f"the warm start samples only {share:.1%} of the answers right after {step} steps.")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return share


def accuracy(task: DigitTask, model: LlamaForCausalLM, rows: Sequence[str], seed: int) -> float:
    """The share of questions that ``model`` answers right, an answer each."""
    sampler, settings = InProcessSampler(), SamplingSettings(task.answer_tokens, 1.0)
    sampler.load(model, 0)
    with torch.no_grad():
        samples = sampler.sample([prompt_ids(row) for row in rows], 1, settings, torch.Generator().manual_seed(seed))
    pairs = zip(samples.tokens, rows, strict=True)
    return sum(torch.equal(tokens, task.answer_ids(row)) for tokens, row in pairs) / len(rows)


def _endless(task: DigitTask, seed: int) -> Iterator[dict[str, Tensor]]:
    generator = random.Random(f"warm {seed}")
    while True:
        yield task.examples([f"{generator.randrange(10**task.digits):0{task.digits}d}" for _ in range(64)])
