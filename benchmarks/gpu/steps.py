"""Whole training steps, interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import Trainee
from benchmarks.gpu.contenders import (
    floor,
    full,
    launch_step,
    ours,
    unsloth_formula,
    unwrapped_loss_at_head,
    with_peft,
)
from benchmarks.gpu.models import batch_of, llama
from benchmarks.gpu.place import Place, host_milliseconds
from benchmarks.timing import interleave, paired_ratio, spread, train_step
from benchmarks.workloads import Batch, Loss, next_token_loss

FEW = ("floor", "FullFT", "ours", "PEFT", "unsloth's formula")
SOME = ("floor", "FullFT", "ours", "ours, bf16 adapters", "PEFT", "PEFT, no autocast", "unsloth's formula")
ALL = (*SOME, "ours, our loss", "ours, dropout 0.1", "PEFT, dropout 0.1")


def step_1b(place: Place) -> dict[str, Any]:
    """Llama-1B, 8,192 tokens."""
    return steps_of(place, llama(place, "1b"), batch_of(place, 128256, 4, 2048), 16, ALL, place.pick(10, 1))


def step_1b_short(place: Place) -> dict[str, Any]:
    """Llama-1B, 1,024 tokens: is the host the limit?"""
    return steps_of(place, llama(place, "1b"), batch_of(place, 128256, 1, 1024), 64, FEW, place.pick(10, 1))


def step_8b(place: Place) -> dict[str, Any]:
    """Layers of Llama-8B, eight of them so that FullFT fits, 8,192 tokens."""
    base, batch = llama(place, "8b", 8), batch_of(place, 128256, 4, 2048)
    return steps_of(place, base, batch, 16, SOME, place.pick(6, 1), unwrapped_loss_at_head)


def step_8b_whole(place: Place) -> dict[str, Any]:
    """Llama-8B whole, 4,096 tokens, rank 64."""
    base, batch = llama(place, "8b"), batch_of(place, 128256, 2, 2048)
    names = ("floor", "ours", "PEFT, no autocast")
    return steps_of(place, base, batch, 64, names, place.pick(5, 1), unwrapped_loss_at_head)


def steps_of(
    place: Place,
    base: nn.Module,
    batch: Batch,
    rank: int,
    names: Sequence[str],
    repetitions: int,
    loss: Loss = next_token_loss,
) -> dict[str, Any]:
    """Ratios to the floor, FullFT and PEFT, memory, and the time the host needs to launch a step."""
    makers = _makers(base, loss, rank)
    trainees = {name: warmed(place, name, makers[name], batch) for name in names}
    times = interleave({name: partial(train_step, one, batch) for name, one in trainees.items()}, repetitions, 3)
    whole = {name: [phase.step for phase in phases] for name, phases in times.items()}
    for name, phases in times.items():
        row, median = place.found[name], spread(whole[name]).median
        row["ms"], row["tokens/s"] = median * 1e3, batch.input_ids.numel() / median
        parts = list(zip(*phases, strict=True))[:3]
        row["forward, backward, optimizer"] = [statistics.median(seconds) * 1e3 for seconds in parts]
        row |= {f"/ {other}": list(paired_ratio(whole[name], whole[other])) for other in FEW[:4] if other in whole}
        row["host ms"] = host_milliseconds(place, partial(launch_step, trainees[name], batch), 3)
    return place.found


def _makers(base: nn.Module, loss: Loss, rank: int) -> dict[str, Callable[[], Trainee]]:
    return {
        "floor": partial(floor, base, loss),
        "FullFT": partial(full, base, loss),
        "ours": partial(ours, base, loss, rank),
        "ours, bf16 adapters": partial(ours, base, loss, rank, adapter_dtype="bfloat16"),
        "ours, our loss": partial(ours, base, unwrapped_loss_at_head, rank),
        "ours, dropout 0.1": partial(ours, base, loss, rank, dropout=0.1),
        "PEFT": partial(with_peft, base, loss, rank),
        "PEFT, no autocast": partial(with_peft, base, loss, rank, autocast=False),
        "PEFT, dropout 0.1": partial(with_peft, base, loss, rank, dropout=0.1),
        "unsloth's formula": partial(unsloth_formula, base, loss, rank),
    }


def warmed(place: Place, name: str, make: Callable[[], Trainee], batch: Batch) -> Trainee:
    """A trainee that has taken three steps; the third tells its peak memory."""
    place.fresh()
    held = 0 if place.dry else torch.cuda.memory_allocated()
    trainee = make()
    for _ in range(2):
        train_step(trainee, batch)
    if not place.dry:
        torch.cuda.reset_peak_memory_stats()
    train_step(trainee, batch)
    peak = 0.0 if place.dry else (torch.cuda.max_memory_allocated() - held) / 2**30
    place.found[name] = {"peak above before, GiB": peak}
    return trainee
