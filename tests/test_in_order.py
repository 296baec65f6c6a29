"""Threads share the work; results come in its order, and little of it is begun ahead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from lightning_lora.in_order import Workers, workers


def test_results_come_in_the_order_of_the_items() -> None:
    def slow(item: int) -> int:
        time.sleep(0.01 * (item % 3 == 0))
        return item * item

    with ThreadPoolExecutor(4) as pool:
        assert list(Workers(pool, 8).map(slow, range(30))) == [item * item for item in range(30)]


def test_no_more_items_are_taken_than_asked_for() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    with ThreadPoolExecutor(2) as pool:
        results = Workers(pool, 3).map(abs, items())
        assert next(results) == 0
        assert len(taken) == 4


def test_an_error_arrives_in_its_turn() -> None:
    def fail(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    with ThreadPoolExecutor(2) as pool:
        results = Workers(pool, 50).map(fail, range(40))
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError, match="two"):
            next(results)


def test_torch_computes_with_one_thread_meanwhile_and_as_before_after() -> None:
    before = torch.get_num_threads()
    with suppress(KeyError), workers() as threads:
        assert torch.get_num_threads() == 1
        assert next(threads.map(abs, [-1])) == 1
        raise KeyError
    assert torch.get_num_threads() == before
