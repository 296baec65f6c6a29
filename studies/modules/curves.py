"""A plain training loop for scripts that read one loss at many steps of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from lightning_lora import LoRAConfig, lora_layers
from studies.modules.rows import Rows, Task, rows_of
from studies.modules.task import TinyTask
from studies.modules.tiny_gpt import row_losses

BATCH = 32


@dataclass(frozen=True)
class Point:
    """A run at one step.

    Args:
        loss: On the scored rows, in nats a token.
        b_over_a: The largest singular value of B over that of A, the mean over adapted weights; 0 without adapters.
    """

    loss: float
    b_over_a: float


def points_at(
    task: Task, lora: LoRAConfig | None, rate: float, seed: int, at: Iterable[int], num_rows: int, held_out: int = 256
) -> dict[int, Point]:
    """Train at a constant rate, and return the loss on fixed rows, and norms, after each of the steps ``at``.

    A seed moves the order of the rows and the first values of the adapters alike in all runs. A run ends early with NaN
    at all further steps once its loss is not finite.

    Args:
        task: What is learnt.
        lora: Settings of the adapters, or None for full fine-tuning.
        rate: Adam's rate of what is trained, for adapters too: ``lr_multiplier`` is not used.
        seed: Of the run.
        at: Steps to measure at; 0 is before the first one.
        num_rows: Different training rows.
        held_out: Rows that are scored; for facts all training rows are.
    """
    at = sorted(set(at))
    train = rows_of(task, "new", num_rows, seed=1)
    scored = train if task == "facts" else rows_of(task, "new", held_out, seed=2)
    order = _batches(num_rows, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    with _without_infos():
        module = TinyTask(lora=None if lora is None else replace(lora, lr_multiplier=1.0), learning_rate=rate)
        module.configure_model()
        optimizer = module.configure_optimizers()
    found: dict[int, Point] = {}
    for step in range(at[-1] + 1):
        if step in at:
            found[step] = Point(_score(module, scored), _b_over_a(module))
            if not math.isfinite(found[step].loss):
                break
        places = next(order)
        loss, _ = row_losses(module.gpt(train["input_ids"][places]), train["labels"][places])
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return {step: found.get(step, Point(math.nan, math.nan)) for step in at}


def _batches(num_rows: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    while True:
        yield from torch.randperm(num_rows, generator=generator)[: num_rows - num_rows % BATCH].split(BATCH)


@torch.no_grad()
def _score(module: TinyTask, rows: Rows) -> float:
    return float(row_losses(module.gpt(rows["input_ids"]), rows["labels"])[0].double().mean())


@torch.no_grad()
def _b_over_a(module: TinyTask) -> float:
    ratios = [
        float(torch.linalg.matrix_norm(layer.get_parameter("lora_B"), 2))
        / float(torch.linalg.matrix_norm(layer.get_parameter("lora_A"), 2))
        for layer in lora_layers(module).values()
    ]
    return fmean(ratios) if ratios else 0.0


@contextmanager
def _without_infos() -> Iterator[None]:
    """Leave out the report of each injection."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
