"""What the tasks on digits ask, and what their rewards say."""

from __future__ import annotations

from studies.modules.digits import END, TASKS


def test_answers_are_in_order_or_reversed_and_end() -> None:
    assert {name: task.answer("304122") for name, task in TASKS.items()} == {"sort": "012234", "reverse": "221403"}
    assert TASKS["reverse"].answer_ids("304122").tolist() == [2, 2, 1, 4, 0, 3, END]
    assert TASKS["reverse"].answer_tokens == 7


def test_only_the_answer_of_an_example_has_labels() -> None:
    batch = TASKS["sort"].examples(["304122", "998877"])
    assert batch["labels"].tolist() == [[-100] * 7 + [0, 1, 2, 2, 3, 4, END], [-100] * 7 + [7, 7, 8, 8, 9, 9, END]]
    assert (batch["input_ids"][:, 7:] == batch["labels"][:, 7:]).all()


def test_a_shuffled_reward_goes_to_another_answer_and_none_to_nobody() -> None:
    task, prompts = TASKS["sort"], [f"{number:06d}" for number in range(10, 200)]
    answers = [task.answer(prompt) if number % 2 else "000000" for number, prompt in enumerate(prompts)]
    right = task.reward(prompts, answers, ["none"])
    assert right == [float(number % 2) for number in range(len(prompts))]
    shuffled = task.reward(prompts, answers, ["shuffled"])
    assert sum(shuffled) == sum(right)
    assert 0.3 < sum(one == other for one, other in zip(right, shuffled, strict=True)) / len(right) < 0.7
    assert not any(task.reward(prompts, answers, ["zero"]))
