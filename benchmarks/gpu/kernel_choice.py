"""Each Triton kernel against torch, shape by shape: right, and faster or not; and the table that chooses by it.

    python -m benchmarks.on_gpu --out runs/gpu --only kernel_choice
    cp runs/gpu/measured.json lightning_lora/lora/functional/kernels/    # then commit it

A shape is listed with the fewest and the most rows between which the kernel won at every count that was measured. It
wins where 9 of 10 interleaved rounds are at least 3 % faster. The table keeps what it says of other devices.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.place import Place, error
from benchmarks.timing import Clock, interleave, paired_ratio
from lightning_lora.lora.functional.gated_input import (
    gate_shape,
    gradients_and_input,
    is_one_pass,
    recomputed,
    source_gradients,
)
from lightning_lora.lora.functional.kernels import choice
from lightning_lora.lora.functional.narrow_products import narrow_gradients, narrow_shape, transposed_times_narrow
from lightning_lora.tasks.head_loss import head_loss

TABLE = "measured.json"
SETTINGS = ("all", "off")
WON = 0.97
HIDDEN = 64
LIMITS = {torch.bfloat16: 1.5e-2, torch.float32: 2e-5}
"""Errors that are allowed; the interpreter cannot multiply matrices of bfloat16, so a dry run is in float32."""
Results = list[Tensor]


class Case(NamedTuple):
    """One kernel on one shape.

    Args:
        kernel: Its name in the table.
        shape: Its shape in the table.
        rows: Numbers of rows.
        make: Makes inputs of a type for a number of rows.
        compute: What is computed, by kernel or by torch as the setting says.
        exact: The same in float64.
    """

    kernel: str
    shape: str
    rows: tuple[int, ...]
    make: Callable[[int, torch.dtype], list[Tensor]]
    compute: Callable[..., Results]
    exact: Callable[..., Results]


def kernel_choice(place: Place) -> dict[str, Any]:
    """Each Triton kernel against torch by shape: error of both, time over torch's; where it is right and faster."""
    if not choice.has_triton() or (place.dry and os.environ.get("TRITON_INTERPRET") != "1"):
        return {"skipped": "needs Triton, and CUDA or TRITON_INTERPRET=1"}
    before = os.environ.get(choice.SETTING)
    won: dict[str, dict[str, list[int]]] = {}
    try:
        dtype = place.pick(torch.bfloat16, torch.float32)
        for case in cases(place):
            key, verdicts = choice.key(torch.empty(0, dtype=dtype), case.shape), {}
            for rows in case.rows:
                try:
                    verdicts[rows] = measure(place, case, rows, dtype)
                except torch.OutOfMemoryError:
                    verdicts[rows] = {"skipped": "out of memory", "won": False}
            place.found[f"{case.kernel}, {key}"] = verdicts
            if span := longest_run(case.rows, [v["won"] for v in verdicts.values()]):
                won.setdefault(case.kernel, {})[key] = span
            write_table(place, won)
    finally:
        os.environ.pop(choice.SETTING, None)
        os.environ |= {} if before is None else {choice.SETTING: before}
    return place.found


def measure(place: Place, case: Case, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Errors of kernel and torch, and the time of the kernel over that of torch."""
    place.fresh()
    made = case.make(rows, dtype)
    errors = {setting: worst_error(case, made, setting) for setting in SETTINGS}

    def run(setting: str) -> float:
        os.environ[choice.SETTING] = setting
        clock = Clock(place.device)
        case.compute(*made)
        clock.mark()
        return clock.intervals()[0]

    times = interleave({name: partial(run, name) for name in SETTINGS}, place.pick(20, 3), place.pick(3, 1))
    ratio = paired_ratio(times["all"], times["off"])
    return {
        "errors": [errors["all"], errors["off"]],
        "time over torch's": list(ratio),
        "won": bool(errors["all"] <= LIMITS[dtype] and ratio.p90 <= WON),
    }


def worst_error(case: Case, made: list[Tensor], setting: str) -> float:
    """Against float64, of all results."""
    os.environ[choice.SETTING] = setting
    found = case.compute(*(tensor.clone() for tensor in made))
    wanted = case.exact(*(tensor.double() if tensor.is_floating_point() else tensor.clone() for tensor in made))
    return max(error(a, b) for a, b in zip(found, wanted, strict=True))


def longest_run(rows: Sequence[int], won: Sequence[bool]) -> list[int] | None:
    """First and last of the longest run of counts that were won; None if none was.

    >>> longest_run([1, 2, 4, 8], [True, False, True, True])
    [4, 8]
    """
    best: list[int] = []
    for is_won, run in itertools.groupby(zip(rows, won, strict=True), key=lambda item: item[1]):
        counts = [count for count, _ in run]
        if is_won and len(counts) > len(best):
            best = counts
    return [best[0], best[-1]] if best else None


def write_table(place: Place, won: dict[str, dict[str, list[int]]]) -> None:
    """The shipped table with what is known of this device in place of what it says."""
    table = choice.table() | {choice.device_name(place.device): won}
    (place.out / TABLE).write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def cases(place: Place) -> Iterator[Case]:
    """Shapes of Llama-1B and 8B, in order of what they save."""
    make = partial(torch.randn, device=place.device)
    rows = place.pick((1024, 4096, 16384), (3,))
    for width, activation, halves in itertools.product(
        place.pick((8192, 14336), (20,)), place.pick(("silu", "tanh", "none"), ("silu",)), (False, True)
    ):
        yield from gates(make, rows, width, activation, halves)
    for out, rank in itertools.product(
        place.pick((512, 1024, 2048, 4096, 8192, 14336), (20,)), place.pick((8, 16, 64), (16,))
    ):
        yield narrow_case(make, rows, out, rank)
    for vocab in place.pick((32000, 128256, 151936), (37,)):
        yield head_case(make, place.pick((512, 1024, 4096), (3,)), vocab)


def gates(make: Any, rows: tuple[int, ...], width: int, activation: str, halves: bool) -> Iterator[Case]:
    def tensors(count: int, dtype: torch.dtype) -> list[Tensor]:
        sources = [make(count, 2 * width)] if halves else [make(count, width), make(count, width)]
        return [tensor.to(dtype) for tensor in (*sources, make(count, width))]

    @torch.no_grad()
    def at_once(*given: Tensor) -> Results:
        *sources, d_x = given
        if not is_one_pass(activation, sources):
            return apart(*given)
        gradients, x = gradients_and_input(activation, sources, d_x)
        return [*gradients, x]

    @torch.no_grad()
    def apart(*given: Tensor) -> Results:
        *sources, d_x = given
        x, activated = recomputed(activation, sources)
        assert x is not None
        return [*source_gradients(activation, sources, d_x, activated), x]

    def exact(*given: Tensor) -> Results:
        *sources, d_x = (tensor.requires_grad_() for tensor in given)
        gate, up = sources if len(sources) == 2 else sources[0].chunk(2, -1)
        x = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=activation)) * up
        return [*torch.autograd.grad(x, sources, d_x.detach()), x.detach()]

    shape = gate_shape(activation, 1 if halves else 2, width)
    yield Case("gate", shape, rows, tensors, at_once, exact)
    yield Case("gate_apart", shape, rows, tensors, apart, exact)


def narrow_case(make: Any, rows: tuple[int, ...], out: int, rank: int) -> Case:
    def tensors(count: int, dtype: torch.dtype) -> list[Tensor]:
        return [make(*shape).to(dtype) for shape in ((count, out), (out, rank), (count, rank))]

    def both(y: Tensor, B: Tensor, inner: Tensor) -> Results:
        d_inner = torch.empty_like(inner)
        d_B = narrow_gradients(d_inner, y, B, inner, 1.0)
        return [d_inner, transposed_times_narrow(y, inner) if d_B is None else d_B]

    return Case("narrow", narrow_shape(out, rank), rows, tensors, both, lambda y, B, S: [y @ B, y.T @ S])


def head_case(make: Any, rows: tuple[int, ...], vocab: int) -> Case:
    def tensors(count: int, dtype: torch.dtype) -> list[Tensor]:
        """The hidden states are narrow, so that the products take little of the time."""
        hidden, weight = (make(size, HIDDEN).to(dtype) for size in (count, vocab))
        return [hidden, weight, torch.arange(count, device=hidden.device) % vocab]

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Results:
        value = head_loss(hidden.requires_grad_(), weight, labels, chunk_rows=len(hidden))
        return [value.detach(), *torch.autograd.grad(value, hidden)]

    def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Results:
        value = F.cross_entropy(hidden.requires_grad_() @ weight.T, labels, reduction="sum")
        return [value.detach(), *torch.autograd.grad(value, hidden)]

    return Case("cross_entropy", str(vocab), rows, tensors, loss, exact)
