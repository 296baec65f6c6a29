"""Verdicts on tasks are those of the statistics of a study, with questions in the place of rows."""

from __future__ import annotations

from typing import Any

import pytest
from numpy.random import default_rng

from lightning_lora.errors import DataError
from lightning_lora.study.statistics.crossed import paired_interval
from lightning_lora.study.tasks.judge import judge, questions_needed
from tests.study.tasks.planted import NAME, scores

NOISE = default_rng(0).random((9, 4000))


def half(seed: int, question: int) -> float:
    return float(question % 2)


def test_equal_models_match_within_a_point() -> None:
    arms = {"full": scores(half), "rank 8": scores(half)}
    (found,) = judge(arms, "full", "rank 8", 0.01, (1, 2, 3))
    assert found.sentence == "rank 8 matches full within 1 point on gsm8k (exact_match, strict-match)"


@pytest.mark.parametrize(
    ("right", "questions", "words"),
    [
        (half, 298, "298 questions; at least 299 are needed for 1 point"),
        (lambda seed, question: 0.0, 400, "neither gets anything right"),
        (lambda seed, question: 1.0, 400, "both get everything right"),
    ],
)
def test_equal_answers_that_show_nothing_are_no_match(right: Any, questions: int, words: str) -> None:
    arms = {"full": scores(right, questions=questions), "rank 8": scores(right, questions=questions)}
    (found,) = judge(arms, "full", "rank 8", 0.01, (1, 2, 3))
    assert found.sentence == f"cannot tell whether rank 8 matches full on gsm8k (exact_match, strict-match): {words}"


def test_the_fewest_questions_exclude_a_share_of_the_band() -> None:
    for band in (0.01, 0.05, 0.2):
        needed = questions_needed(band)
        assert (1 - band) ** needed <= 0.05 < (1 - band) ** (needed - 1)


def test_a_model_that_loses_questions_falls_behind_by_points() -> None:
    def worse(seed: int, question: int) -> float:
        return half(seed, question) * (NOISE[seed, question] > 0.2)

    arms = {"full": scores(half, questions=4000), "rank 1": scores(worse, questions=4000)}
    (found,) = judge(arms, "full", "rank 1", 0.01, (1, 2, 3))
    losses = [
        [arm[NAME] - base[NAME] for arm, base in zip(*both, strict=True)]
        for both in zip(
            ([{NAME: value} for value in arms["rank 1"][seed][NAME].losses] for seed in (1, 2, 3)),
            ([{NAME: value} for value in arms["full"][seed][NAME].losses] for seed in (1, 2, 3)),
            strict=True,
        )
    ]
    interval = paired_interval(losses)
    assert found.verdict.verdict == "behind"
    assert found.verdict.interval is not None
    assert found.verdict.interval.mean == pytest.approx(interval.mean)
    assert found.verdict.interval.low == pytest.approx(interval.low)
    ends = f"{100 * interval.mean:.1f} points ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
    assert found.sentence == f"rank 1 falls behind full by {ends} on gsm8k (exact_match, strict-match)"
    told = found.to_dict()
    assert told["difference"] == pytest.approx(-interval.mean), "a score: more is better"
    assert told["low"] == pytest.approx(-interval.high)
    (turned,) = judge(arms, "rank 1", "full", 0.01, (1, 2, 3))
    assert turned.sentence == f"full is ahead of rank 1 by {ends} on gsm8k (exact_match, strict-match)"


def test_few_questions_cannot_tell_and_say_how_many_would_do() -> None:
    arms = {
        "full": scores(lambda seed, question: float(NOISE[seed, question] > 0.5), questions=50),
        "rank 8": scores(lambda seed, question: float(NOISE[seed + 4, question] > 0.5), questions=50),
    }
    (found,) = judge(arms, "full", "rank 8", 0.01, (1, 2, 3))
    assert found.sentence.startswith("cannot tell whether rank 8 matches full on gsm8k (exact_match, strict-match): ")
    assert " rows" not in found.sentence


def test_one_seed_is_no_verdict() -> None:
    arms = {"full": scores(half, seeds=1), "rank 8": scores(half, seeds=1)}
    (found,) = judge(arms, "full", "rank 8", 0.01, (1,))
    assert found.verdict.verdict == "cannot tell"
    assert "1 seed; at least 3 are needed" in found.sentence
    assert found.verdict.interval is not None, "over questions"


def test_further_comparisons_are_corrected_and_the_main_one_is_not() -> None:
    arms = {name: scores(half) for name in ("full", "rank 1", "rank 8")}
    by_arm = {each.arm: each.verdict for each in judge(arms, "full", "rank 8", 0.01, (1, 2, 3))}
    assert by_arm["rank 8"].p_corrected is None
    assert by_arm["rank 1"].p_corrected is not None
    assert {each.arm for each in by_arm.values()} == {"rank 1", "rank 8"}


def test_models_that_were_asked_other_questions_are_refused() -> None:
    arms = {"full": scores(half), "rank 8": scores(half, questions=100)}
    with pytest.raises(DataError, match="different questions of gsm8k"):
        judge(arms, "full", "rank 8", 0.01, (1, 2, 3))


def test_a_score_that_is_no_share_has_no_points() -> None:
    arms = {name: scores(lambda seed, question: 34.5) for name in ("full", "rank 8")}
    assert judge(arms, "full", "rank 8", 0.01, (1, 2, 3)) == []
