"""What a training step keeps to be faster: the time and the memory of each choice."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.contenders import Trainee, loss_at_head
from benchmarks.gpu.contenders import floor, ours
from benchmarks.gpu.models import batch_of, llama
from benchmarks.gpu.place import Place
from benchmarks.gpu.steps import warmed
from benchmarks.timing import interleave, paired_ratio, spread, train_step
from lightning_lora import StepMemory
from lightning_lora.lora.layers.adapted import keep_gates
from lightning_lora.memory.candidates import HEAD_ROWS, candidates
from lightning_lora.memory.other_settings import recompute


def step_memory(place: Place) -> dict[str, Any]:
    """Gates kept or computed again, rows of a chunk of the head, blocks computed again: time over the floor, memory."""
    ways = candidates(StepMemory(), ("gate", "head_rows", "activation_checkpointing"))
    for size, layers in place.pick((("1b", None), ("8b", 8)), (("toy", None),)):
        base, batch = llama(place, size, layers), batch_of(place, 128256, 4, 2048)
        usual = partial(loss_at_head, chunk_rows=HEAD_ROWS[-1])
        makers = {"floor": partial(floor, base, usual), **{str(way): partial(_trainee, base, way) for way in ways}}
        trainees = {name: warmed(place, name, make, batch) for name, make in makers.items()}
        steps = {name: partial(_seconds, one, batch) for name, one in trainees.items()}
        times = interleave(steps, place.pick(8, 1), 3)
        place.found[size] = {
            name: {
                **place.found.pop(name),
                "ms": spread(each).median * 1e3,
                "/ floor": list(paired_ratio(each, times["floor"])),
            }
            for name, each in times.items()
        }
    return place.found


def _trainee(base: nn.Module, way: StepMemory) -> Trainee:
    made = ours(base, partial(loss_at_head, chunk_rows=way.chunk_rows))
    keep_gates(made.model, way.gate == "keep")
    if way.activation_checkpointing is True:
        recompute(made.model)
    return made


def _seconds(trainee: Trainee, batch: Any) -> float:
    return train_step(trainee, batch).step
