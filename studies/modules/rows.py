"""Rows of three tasks with known answers: random facts, text of a Markov chain, copying.

All share a vocabulary of 64 symbols and one marker for each task, which begins a row. Each task has a version that the
base is pre-trained on (``"old"``) and one to fine-tune on (``"new"``): other facts, another chain, the reverse order.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Task = Literal["facts", "text", "copy"]
Version = Literal["old", "new"]
TASKS: tuple[Task, ...] = ("facts", "text", "copy")
SYMBOLS = 64
VOCAB = SYMBOLS + len(TASKS)
KEY, VALUE = 4, 2
"""Tokens of the key of a fact, and of its value."""
BITS = VALUE * math.log2(SYMBOLS)
"""Bits of a fact: the values are uniform and independent of the keys."""
OLD_FACTS = 3000
TEXT, COPIED = 15, 6
"""Tokens of a text, and of what is copied."""

Rows = dict[Literal["input_ids", "labels"], Tensor]


def rows_of(task: Task, version: Version, count: int, seed: int = 0) -> Rows:
    """``count`` rows ``(count, tokens)``; labels are -100 where there is nothing to learn.

    Args:
        task: What is to be learnt.
        version: Of the base's training, or new.
        count: Number of rows. New facts begin where the old ones end, so none has the key of another.
        seed: Of the rows drawn; facts are the same for every seed.
    """
    marker = torch.full((count, 1), SYMBOLS + TASKS.index(task))
    if task == "facts":
        first = OLD_FACTS if version == "new" else 0
        ids, supervised = torch.cat([marker, _facts(first + count)[first:]], 1), VALUE
    elif task == "text":
        ids, supervised = torch.cat([marker, _text(version, count, seed)], 1), TEXT - 1
    else:
        symbols = torch.randint(SYMBOLS, (count, COPIED), generator=_generator(seed + 1000 * (version == "new")))
        again = symbols.flip(1) if version == "new" else symbols
        ids, supervised = torch.cat([marker, symbols, marker, again], 1), COPIED
    labels = ids.clone()
    labels[:, :-supervised] = -100
    return {"input_ids": ids, "labels": labels}


def text_entropy(version: Version) -> float:
    """The loss of a text, nats a token, that no model can beat: the entropy of the chain in its steady state."""
    chain = _chain(version)
    steady = torch.linalg.matrix_power(chain, 200)[0]
    return float((steady * torch.special.entr(chain).sum(1)).sum())


def _facts(count: int) -> Tensor:
    generator = _generator(7)
    # Twice as many as needed, drawn once for all counts, so that a fact does not depend on how many are asked for.
    drawn = torch.randint(SYMBOLS, (40_000, KEY + VALUE), generator=generator)
    code = (drawn[:, :KEY] * SYMBOLS ** torch.arange(KEY)).sum(1)
    order = torch.argsort(code, stable=True)
    is_first = torch.ones(len(code), dtype=torch.bool)
    is_first[order[1:]] = code[order][1:] != code[order][:-1]
    distinct = drawn[is_first]
    if count > len(distinct):
        raise ValueError(f"there are {len(distinct) - OLD_FACTS:,} new facts at most.")
    return distinct[:count]


def _chain(version: Version) -> Tensor:
    """``(64, 64)`` probabilities of the next symbol."""
    logits = 1.5 * torch.randn(SYMBOLS, SYMBOLS, generator=_generator(11 if version == "old" else 12)).double()
    return logits.softmax(1)


def _text(version: Version, count: int, seed: int) -> Tensor:
    chain, generator = _chain(version), _generator(1_000_003 * (seed + 1) + (version == "new"))
    symbols = torch.randint(SYMBOLS, (count, 1), generator=generator)
    for _ in range(TEXT - 1):
        symbols = torch.cat([symbols, torch.multinomial(chain[symbols[:, -1]], 1, generator=generator)], 1)
    return symbols


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
