"""Rewards in processes: what comes back, and what becomes of a reward that hangs, crashes or returns something else."""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.errors import ConfigError, RewardError
from lightning_lora.tasks.rl.rewards.pool import RewardPool
from lightning_lora.tasks.rl.rewards.worker import Call, answer
from tests.tasks.rl.rewards import rewards_of_a_user as rewards

TIMEOUT = 0.5


@pytest.fixture
def pools() -> Iterator[list[RewardPool]]:
    made: list[RewardPool] = []
    yield made
    for pool in made:
        pool.close()


def as_told(pools: list[RewardPool], **settings: Any) -> RewardPool:
    pool = RewardPool(rewards.as_told, **{"workers": 2, "timeout": TIMEOUT, **settings})
    pools.append(pool)
    pool.start()
    return pool


def test_rewards_come_back_in_the_order_of_the_rows(pools: list[RewardPool]) -> None:
    pools.append(RewardPool(rewards.lengths, workers=2))
    texts = ["a" * (number * 7 % 23) for number in range(100)]
    assert pools[0](texts, texts, {}) == [float(len(text)) for text in texts]
    assert pools[0]([], [], {}) == []


def test_columns_reach_the_reward_row_by_row(pools: list[RewardPool]) -> None:
    pools.append(RewardPool(rewards.exact, workers=2))
    wanted = [str(number % 3) for number in range(30)]
    assert pools[0](["p"] * 30, ["1"] * 30, {"answer": wanted}) == [float(answer == "1") for answer in wanted]


@pytest.mark.parametrize(("size", "seen"), [(1, [1.0] * 5), (2, [2.0, 2.0, 2.0, 2.0, 1.0]), (None, [5.0] * 5)])
def test_a_call_holds_as_many_rows_as_were_asked_for(
    size: int | None, seen: list[float], pools: list[RewardPool]
) -> None:
    pools.append(RewardPool(rewards.rows_seen, workers=1, rows_per_call=size))
    assert pools[0](["p"] * 5, ["c"] * 5, {}) == seen


@pytest.mark.parametrize("hang", ["hang", "spin"])
def test_a_hung_row_is_killed_and_the_others_are_scored(hang: str, pools: list[RewardPool]) -> None:
    pool = as_told(pools, on_timeout=-1.0)
    completions = ["fine"] * 40
    completions[17] = hang
    start = time.monotonic()
    found = pool(["p"] * 40, completions, {})
    assert time.monotonic() - start < TIMEOUT + 1
    assert found == [-1.0 if number == 17 else 1.0 for number in range(40)]
    assert pool(["p"] * 4, ["fine"] * 4, {}) == [1.0] * 4


def test_a_batch_costs_little_beside_the_reward(pools: list[RewardPool]) -> None:
    pools.append(RewardPool(rewards.exact, workers=2))
    pools[0].start()
    prompts, completions, columns = ["p" * 200] * 512, ["c" * 500] * 512, {"answer": ["c"] * 512}
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        pools[0](prompts, completions, columns)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02


def test_a_hung_row_is_an_error_unless_its_reward_was_given(pools: list[RewardPool]) -> None:
    pool = as_told(pools)
    with pytest.raises(RewardError, match=re.escape("reward as_told, row 3: took more than 0.5 seconds.")):
        pool(["p"] * 5, ["fine", "fine", "fine", "hang", "fine"], {})


FAULTS = {
    "nan": "returned nan; a reward is a finite number",
    "none": "returned None; a reward is a finite number",
    "text": "returned '1'; a reward is a finite number",
    "nothing": "returned None; return a list with a number for each row",
    "two": "returned 2 rewards for 1 row",
    "raise": "raised ZeroDivisionError: of mine (",
    "exit": "ended its process with code 7",
    "stop": "ended its process with code 1",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_function_row_prompt_and_completion(fault: str, pools: list[RewardPool]) -> None:
    pool = as_told(pools)
    with pytest.raises(RewardError) as caught:
        pool(["p", "why?", "p"], ["fine", fault, "fine"], {})
    assert str(caught.value).startswith(f"reward as_told, row 1: {FAULTS[fault]}")
    assert caught.value.message.endswith(f"The prompt: 'why?'; the completion: '{fault}'")
    assert pool(["p"], ["fine"], {}) == [1.0]


def test_the_first_of_several_faults_is_told_and_the_others_are_counted(pools: list[RewardPool]) -> None:
    pool = as_told(pools)
    with pytest.raises(RewardError, match=r"row 1: returned nan.* 2 more calls failed"):
        pool(["p"] * 6, ["fine", "nan", "fine", "none", "fine", "two"], {})


def test_without_workers_the_reward_is_called_here(pools: list[RewardPool]) -> None:
    here = RewardPool(lambda prompts, completions: [float(os.getpid())] * len(prompts), workers=0)
    assert here(["p"], ["c"], {}) == [float(os.getpid())]
    pools.append(RewardPool(lambda prompts, completions: [float(os.getpid())] * len(prompts), workers=1))
    assert pools[0](["p"], ["c"], {}) != [float(os.getpid())]


def test_tensors_and_arrays_are_numbers_but_not_with_gradients() -> None:
    call = Call(["p", "p"], ["a", "b"], {})
    assert answer(lambda **_: torch.tensor([1, 2]), call) == [1.0, 2.0]
    assert answer(lambda **_: [torch.tensor(0.5), True], call) == [0.5, 1.0]
    assert answer(lambda **_: torch.ones(2, requires_grad=True), call) == (
        0,
        "returned a tensor that requires gradients; return found.tolist()",
    )


def test_a_reward_that_cannot_be_loaded_elsewhere_is_told(
    pools: list[RewardPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"reward Holder cannot be sent to another process: .* set workers to 0"):
        RewardPool(Holder(number for number in ()))
    module = tmp_path / "of_mine.py"
    module.write_text("def reward(prompts, completions):\n    return [1.0] * len(prompts)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import of_mine  # type: ignore[import-not-found]

    module.write_text("import something_else_again\n")
    pools.append(RewardPool(of_mine.reward, workers=1))
    with pytest.raises(ConfigError, match="reward reward cannot be loaded in another process: ModuleNotFoundError"):
        pools[0](["p"], ["c"], {})


class Holder:
    def __init__(self, numbers: Iterator[int]) -> None:
        self.numbers = numbers

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        return [0.0] * len(prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": -1}, "workers must be a whole number of 0 or more, got -1"),
        ({"rows_per_call": 0}, "rows_per_call must be a whole number of 1 or more, got 0"),
        ({"timeout": 0}, "timeout must be above 0, got 0"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardPool(rewards.lengths, **settings)


def test_lists_of_unequal_length_are_refused(pools: list[RewardPool]) -> None:
    pools.append(RewardPool(rewards.exact, workers=1))
    with pytest.raises(ConfigError, match=re.escape("{'prompts': 2, 'completions': 2, 'answer': 1}")):
        pools[0](["p", "p"], ["c", "c"], {"answer": ["c"]})


def test_no_process_is_left_behind() -> None:
    pool = RewardPool(rewards.lengths, workers=2)
    pool(["p"], ["c"], {})
    children = [process.child for process in pool._processes]
    assert [child.poll() for child in children] == [None, None]
    del pool
    gc.collect()
    assert [child.poll() for child in children] == [-9, -9]
