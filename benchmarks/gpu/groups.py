"""One group of linear layers by formulation, and what recomputing the gate costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.contenders import Trainee, UnslothFormula, floor, ours
from benchmarks.gpu.lean import Lean
from benchmarks.gpu.models import batch_of, llama
from benchmarks.gpu.place import Place, host_milliseconds, milliseconds
from benchmarks.timing import interleave, paired_ratio, train_step
from benchmarks.workloads import next_token_loss
from lightning_lora.lora.functional import AdaptedWeight, fused_lora_linears
from lightning_lora.lora.layers.adapted import keep_gates

# Width of the input, widths of the outputs that share it.
SHAPES = {
    "1b qkv": (2048, (2048, 512, 512)),
    "1b gate up": (2048, (8192, 8192)),
    "1b down": (8192, (2048,)),
    "8b qkv": (4096, (4096, 1024, 1024)),
    "8b o": (4096, (4096,)),
    "8b gate up": (4096, (14336, 14336)),
    "8b down": (14336, (4096,)),
}
SCALE = 2.0


def groups(place: Place) -> dict[str, Any]:
    """One group of linear layers, forward and backward, by formulation."""
    for name, (width, outs) in place.pick(SHAPES, {"toy": (64, (64, 32))}).items():
        for rank in (16, 64):
            ways = formulations(place, width, outs, rank)
            times = {way: milliseconds(place, call, 10, 3) for way, call in ways.items()}
            place.found[f"{name}, rank {rank}"] = {
                **{way: round(ms / times["frozen"], 3) for way, ms in times.items()},
                "frozen, ms": round(times["frozen"], 3),
                "host ms, ours": round(host_milliseconds(place, ways["ours"], 5), 3),
                "host ms, lean": round(host_milliseconds(place, ways["lean"], 5), 3),
            }
    return place.found


def formulations(place: Place, width: int, outs: Sequence[int], rank: int) -> dict[str, Callable[[], object]]:
    """Forward and backward of one group, by name; factors are float32 unless the name says otherwise."""
    make, low = partial(torch.randn, device=place.device), torch.bfloat16
    x = make(1, place.pick(8192, 32), width, dtype=low).requires_grad_()
    Ws = [make(o, width, dtype=low) / width**0.5 for o in outs]
    d_outputs = [make(1, x.shape[1], o, dtype=low) for o in outs]
    As = [(make(rank, width) / width**0.5).requires_grad_() for _ in outs]
    Bs = [(make(o, rank) * 0.02).requires_grad_() for o in outs]
    A_low, B_low = ([t.detach().to(low).requires_grad_() for t in factors] for factors in (As, Bs))
    wide, narrow = list(zip(Ws, As, Bs, strict=True)), list(zip(Ws, A_low, B_low, strict=True))
    stacked, B_cast = torch.cat([a.detach() for a in A_low]), [b.detach() for b in B_low]

    def back(outputs: Any, *factors: Tensor) -> None:
        torch.autograd.grad(outputs, [x, *factors], d_outputs)

    def full() -> None:
        back([F.linear(x, W) for W in Ws])
        for d_output in d_outputs:
            _ = d_output[0].T @ x[0]

    def adapted(weights: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[AdaptedWeight]:
        return [AdaptedWeight(W, None, A.to(x.dtype), B.to(x.dtype), SCALE) for W, A, B in weights]

    def peft_default(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return (F.linear(x, W) + F.linear(F.linear(x.float(), A), B) * SCALE).to(x.dtype)

    return {
        "frozen": lambda: back([F.linear(x, W) for W in Ws]),
        "FullFT": full,
        "ours": lambda: back(fused_lora_linears(x, adapted(wide)), *As, *Bs),
        "ours, bf16 adapters": lambda: back(fused_lora_linears(x, adapted(narrow)), *A_low, *B_low),
        "lean": lambda: back(Lean.apply(x, SCALE, stacked, B_cast, Ws, *As, *Bs), *As, *Bs),
        "unsloth's formula": lambda: back(
            [UnslothFormula.apply(x, W, A, B, SCALE) for W, A, B in narrow], *A_low, *B_low
        ),
        "written out": lambda: back(
            [F.linear(x, W) + F.linear(F.linear(x, A) * SCALE, B) for W, A, B in narrow], *A_low, *B_low
        ),
        "PEFT's default formula": lambda: back([peft_default(*weights) for weights in wide], *As, *Bs),
    }


def gated(place: Place) -> dict[str, Any]:
    """What computing silu(gate) * up again costs, against keeping it."""
    for size in place.pick(("1b", "8b"), ("toy",)):
        place.found[size] = _gated(place, size)
    return place.found


def _gated(place: Place, size: str) -> dict[str, Any]:
    base, batch = llama(place, size, 2, 4096), batch_of(place, 4096, 4, 2048)

    def step(trainee: Trainee) -> float:
        return train_step(trainee, batch).step

    makers = {"floor": floor, "again": ours, "kept": ours}
    trainees = {name: make(base, next_token_loss) for name, make in makers.items()}
    keep_gates(trainees["kept"].model, True)
    times = interleave({name: partial(step, one) for name, one in trainees.items()}, place.pick(10, 1), 3)
    return {name: list(paired_ratio(each, times["floor"])) for name, each in times.items()}
