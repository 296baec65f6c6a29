"""Words for the differences of arms on tasks: paired by question and seed, with the statistics of a study."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_lora.errors import ResultFileError
from lightning_lora.study.statistics.arm import Arm
from lightning_lora.study.statistics.compare import compare, corrected
from lightning_lora.study.statistics.interval import ALPHA
from lightning_lora.study.statistics.verdict import Verdict
from lightning_lora.study.tasks.samples import Scores

BySeed = Mapping[int, Mapping[tuple[str, str], Scores]]


@dataclass(frozen=True)
class TaskVerdict:
    """What is said of an arm on a task.

    Args:
        verdict: The verdict, whose differences are shares of the questions lost: positive where the arm is worse.
    """

    task: str
    metric: str
    questions: int
    verdict: Verdict
    arm: str

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        found, both = self.verdict, f"{self.arm} {{}} {self.verdict.baseline}"
        where = f" on {self.task} ({self.metric})"
        if found.verdict == "cannot tell":
            reason = re.sub(r"\b([\d,]+) rows\b", r"\1 questions", found.reason)
            return f"cannot tell whether {both.format('matches')}{where}{reason and f': {reason}'}"
        if found.verdict == "matches":
            return f"{both.format('matches')} within {points(found.band)}{where}"
        verb = "falls behind" if found.verdict == "behind" else "is ahead of"
        if found.interval is None or found.p is None:
            return f"{both.format(verb)}{where}: {found.reason}"
        ends = sorted(abs(end) if found.interval.mean else end for end in (found.interval.low, found.interval.high))
        return (
            f"{both.format(verb)} by {points(abs(found.interval.mean))} ({_plain(ends[0])} to {_plain(ends[1])}){where}"
        )

    def to_dict(self) -> dict[str, Any]:
        """What ``tasks.json`` holds: differences are scores of the arm minus those of the baseline, more is better."""
        found = self.verdict.to_dict()
        turned = {"difference": "difference", "low": "high", "high": "low"}
        numbers = {name: None if (value := found[from_]) is None else 0.0 - value for name, from_ in turned.items()}
        kept = {name: found[name] for name in ("verdict", "seeds", "band", "alpha", "spread", "p", "p_corrected")}
        names = {"task": self.task, "metric": self.metric, "arm": self.arm, "baseline": self.verdict.baseline}
        return {**names, **kept, **numbers, "questions": self.questions, "sentence": self.sentence}


def judge(
    scores: Mapping[str, BySeed], baseline: str, primary: str, band: float, seeds: Sequence[int]
) -> list[TaskVerdict]:
    """The verdicts on all tasks.

    Args:
        scores: Arm to seed to the scores of its model.
        primary: The arm whose comparison on the first task and metric is not corrected; all others are, by Holm.
        band: Share of the questions that counts as no difference.

    Raises:
        DataError: If models were asked different questions.
    """
    found: list[TaskVerdict] = []
    for name in _common(scores):
        if not all(by_seed[seed][name].is_share for by_seed in scores.values() for seed in by_seed):
            continue  # a score that is no share of questions has no points
        _check_questions(scores, name)
        arms = {arm: Arm(arm, {seed: each[name].losses for seed, each in by.items()}) for arm, by in scores.items()}
        count = len(next(iter(scores[baseline].values()))[name].values)
        for arm in scores:
            if arm != baseline:
                verdict = compare(arms[arm], arms[baseline], band=band, seeds=seeds)
                verdict = _doubted(verdict, [arms[arm], arms[baseline]], count)
                found.append(TaskVerdict(*name, count, verdict, arm))
    if not found:
        return []
    # `corrected` knows comparisons by the name of their arm: here an arm has one for each task and metric.
    labels = [f"{each.arm} on {each.task} ({each.metric})" for each in found]
    first = next((label for each, label in zip(found, labels, strict=True) if each.arm == primary), None)
    named = [replace(each.verdict, arm=label) for each, label in zip(found, labels, strict=True)]
    return [
        TaskVerdict(each.task, each.metric, each.questions, replace(verdict, arm=each.arm), each.arm)
        for each, verdict in zip(found, corrected(named, first), strict=True)
    ]


def questions_needed(band: float, alpha: float = ALPHA) -> int:
    """The fewest questions that can show a match: without a single different answer, a share of ``band`` is excluded.

    >>> questions_needed(0.01)
    299
    """
    return math.ceil(math.log(alpha) / math.log(1 - band))


def _doubted(verdict: Verdict, arms: Sequence[Arm], count: int) -> Verdict:
    """The verdict, but no match by a task that nobody can do, or everybody, or by very few questions."""
    if verdict.verdict != "matches":
        return verdict
    means = {mean for arm in arms for mean in arm.means().values()}
    if means in ({0.0}, {1.0}):
        reason = "both get everything right" if means == {0.0} else "neither gets anything right"
    elif count < (needed := questions_needed(verdict.band)):
        reason = f"{count} questions; at least {needed} are needed for {points(verdict.band)}"
    else:
        return verdict
    return replace(verdict, verdict="cannot tell", reason=reason, p=None)


def points(share: float) -> str:
    """A share of questions as points.

    >>> points(0.01), points(0.032)
    ('1 point', '3.2 points')
    """
    text = _plain(share)
    return f"{text} point" if text == "1" else f"{text} points"


def _plain(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0")


def _common(scores: Mapping[str, BySeed]) -> list[tuple[str, str]]:
    """Tasks and metrics that all models have, in the order of the first."""
    models = [found for by_seed in scores.values() for found in by_seed.values()]
    return [name for name in models[0] if all(name in each for each in models)] if models else []


def _check_questions(scores: Mapping[str, BySeed], name: tuple[str, str]) -> None:
    asked = {found[name].questions for by_seed in scores.values() for found in by_seed.values()}
    if len(asked) > 1:
        raise ResultFileError(
            f"the models were asked different questions of {name[0]}: remove their folders and begin again."
        )
