"""A strategy divides memory, and the largest micro-batch is one whose own trace fits."""

from __future__ import annotations

import pytest

from lightning_lora.errors import ConfigError
from lightning_lora.memory.micro_batch import largest_micro_batch
from lightning_lora.memory.parts import MemoryParts
from lightning_lora.memory.strategies import STRATEGIES, divide_memory

ONE = MemoryParts(weights=1000, adapters=10, gradients=11, optimizer=20, activations=300, logits=50)


def test_one_device_holds_everything_under_every_strategy() -> None:
    assert all(divide_memory(ONE, strategy, 1) == ONE for strategy in STRATEGIES)


def test_ddp_adds_buckets_of_the_size_of_the_gradients() -> None:
    assert divide_memory(ONE, "ddp", 4) == divide_memory(ONE, "auto", 4)
    assert divide_memory(ONE, "ddp", 4).total == ONE.total + ONE.gradients


def test_zero_2_splits_gradients_and_optimizer_only() -> None:
    part = divide_memory(ONE, "deepspeed", 2)
    assert (part.weights, part.gradients, part.optimizer, part.overhead) == (1000, 6, 10, 11)


def test_fsdp2_splits_all_but_activations_and_holds_two_layers_whole() -> None:
    part = divide_memory(ONE, "fsdp2", 4, layer=100)
    assert (part.weights, part.adapters, part.gradients, part.optimizer) == (250, 3, 3, 5)
    assert (part.activations, part.logits, part.overhead) == (300, 50, 200)


@pytest.mark.parametrize(
    ("strategy", "devices", "message"),
    [("fsdp3", 2, "did you mean 'fsdp"), ("single", 2, "use ddp or fsdp2"), ("ddp", 0, "1 or more, got 0")],
)
def test_what_cannot_be_divided_is_refused(strategy: str, devices: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        divide_memory(ONE, strategy, devices)


@pytest.mark.parametrize("limit", [99, 100, 109, 110, 125, 1000, 12345])
def test_the_largest_micro_batch_is_exact_on_a_line(limit: int) -> None:
    assert largest_micro_batch(lambda rows: MemoryParts(activations=90 + 10 * rows), limit) == max(
        0, (limit - 90) // 10
    )


def test_a_size_that_does_not_fit_by_its_own_trace_is_lowered() -> None:
    def trace(rows: int) -> MemoryParts:
        return MemoryParts(activations=rows + rows * rows // 50)

    rows = largest_micro_batch(trace, 1000)
    assert trace(rows).total <= 1000
    assert rows >= 150  # the largest is 200


def test_few_traces_are_made() -> None:
    sizes: list[int] = []

    def trace(rows: int) -> MemoryParts:
        sizes.append(rows)
        return MemoryParts(activations=5 + 2 * rows)

    assert largest_micro_batch(trace, 1005) == 500
    assert sizes == [1, 2, 500]


def in_order(parts: dict[int, int], limit: int, allowed: list[int] | None = None) -> tuple[int, list[int]]:
    """What is found among steps of so many bytes, and the sizes that were traced, in order."""
    sizes: list[int] = []

    def trace(rows: int) -> MemoryParts:
        sizes.append(rows)
        return MemoryParts(activations=parts[rows])

    return largest_micro_batch(trace, limit, allowed), sizes


LINE = {rows: 100 + 10 * rows for rows in range(1, 25)}
SQUARE = {rows: 100 + 10 * rows + rows * rows for rows in range(1, 25)}


@pytest.mark.parametrize(
    "parts", [LINE, SQUARE, {rows: 500 for rows in LINE}, {rows: 100 + rows // 5 for rows in LINE}]
)
@pytest.mark.parametrize("allowed", [[1, 2, 3, 4, 6, 8, 12, 24], [6, 4, 3, 2, 1], [1, 23], [7], [5, 10, 20]])
@pytest.mark.parametrize("limit", [99, 102, 111, 135, 140, 175, 220, 340, 500, 10_000])
def test_of_given_sizes_the_largest_that_fits_is_found(parts: dict[int, int], allowed: list[int], limit: int) -> None:
    found, traced = in_order(parts, limit, allowed)
    assert found == max((rows for rows in allowed if parts[rows] <= limit), default=0)
    assert len(traced) == len(set(traced))


def test_of_given_sizes_the_largest_is_traced_first_and_alone_if_it_fits() -> None:
    divisors = [24, 12, 8, 6, 4, 3, 2, 1]
    assert in_order(LINE, 340, divisors) == (24, [24])
    assert in_order(LINE, 200, divisors) == (8, [24, 1, 2, 8])
    assert in_order(SQUARE, 200, divisors) == (6, [24, 1, 2, 6])
