"""What lm-eval has written: the score of each question, by task and metric."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.errors import ResultFileError


@dataclass(frozen=True)
class Scores:
    """The scores of one model on one task by one metric.

    Args:
        metric: Name of the metric, with the filter that took the answer out of the text, if the task has several.
        questions: What each question is, by a hash; in the order of ``values``.
        values: The score of each question.
        is_better_high: Whether a higher score is better.
    """

    task: str
    metric: str
    questions: tuple[str, ...]
    values: tuple[float, ...]
    is_better_high: bool = True

    @property
    def name(self) -> tuple[str, str]:
        """Task and metric."""
        return self.task, self.metric

    @property
    def mean(self) -> float:
        """The mean score."""
        return sum(self.values) / len(self.values)

    @property
    def losses(self) -> list[float]:
        """``(questions,)`` what is lost on each: less is better."""
        return [1 - value if self.is_better_high else value for value in self.values]

    @property
    def is_share(self) -> bool:
        """Whether all scores are between 0 and 1, so that points can be told."""
        return all(0 <= value <= 1 for value in self.values)


def read_scores(folder: Path) -> dict[tuple[str, str], Scores]:
    """Task and metric to the scores of the latest evaluation in a folder; empty before the first one.

    Raises:
        DataError: If a file is damaged.
    """
    results = sorted(folder.rglob("results_*.json"), key=lambda file: file.name)
    if not results:
        return {}
    try:
        whole = json.loads(results[-1].read_text(encoding="utf-8"))
        better = whole.get("higher_is_better") or {}
        found: dict[tuple[str, str], Scores] = {}
        for task in whole["configs"]:
            stamp = results[-1].name.removeprefix("results_").removesuffix(".json")
            file = results[-1].with_name(f"samples_{task}_{stamp}.jsonl")
            if file.is_file():
                found |= {each.name: each for each in _of_task(task, file, better.get(task) or {})}
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResultFileError(
            f"{folder} cannot be read as results of lm-eval: {type(error).__name__}: {error}"
        ) from error


def _of_task(task: str, file: Path, better: Mapping[str, bool]) -> Iterator[Scores]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    filters = {str(row.get("filter", "none")) for row in rows}
    values: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        question = f"{row['doc_id']} {row.get('doc_hash', '')}"
        for metric, value in _numbers(row):
            values.setdefault((metric, str(row.get("filter", "none"))), {})[question] = value
    for (metric, filter), by_question in values.items():
        name = metric if len(filters) == 1 else f"{metric}, {filter}"
        yield Scores(task, name, tuple(by_question), tuple(by_question.values()), better.get(metric, True))


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics of a question that are numbers; a perplexity, which is a pair of sums, is none."""
    for metric in row["metrics"]:
        value = row.get(metric)
        if isinstance(value, (int, float)):
            yield metric, float(value)
