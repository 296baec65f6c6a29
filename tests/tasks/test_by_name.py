"""A task is found by the names that checkpoints and configs give it."""

from __future__ import annotations

import pytest

from lightning_lora import tasks
from lightning_lora.tasks.by_name import TASKS, task_named


def test_every_task_is_found_by_its_short_and_its_long_name() -> None:
    assert {task.__name__ for task in TASKS} == set(tasks.__all__)
    for task in TASKS:
        assert task_named(f"lightning_lora.tasks.{task.__name__}") is task
        assert task_named(f"{task.__module__}.{task.__qualname__}") is task


@pytest.mark.parametrize("name", [None, "", "CausalLM", "mine.CausalLM", "lightning_lora.tasks.PretrainedTask"])
def test_another_class_is_none_of_ours(name: str | None) -> None:
    assert task_named(name) is None
