"""What a study finds beside the verdicts about its arms: the noise floor, and what a large batch costs adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

from numpy.typing import ArrayLike

from lightning_lora.study.matched.spec import StudySpec
from lightning_lora.study.statistics.arm import Arm
from lightning_lora.study.statistics.batch_penalty import batch_penalty, penalty_sentence
from lightning_lora.study.statistics.compare import compare
from lightning_lora.study.statistics.verdict import Verdict


@dataclass(frozen=True)
class Further:
    """What is found beside the verdicts.

    Args:
        noise_floor: The baseline against itself with other seeds; None if not asked for, or not finished.
        spread: Standard deviation over all of its seeds of the baseline's loss, nats; None if not known.
        batch_penalty: The difference of differences; None if not asked for, or not finished.
    """

    noise_floor: Verdict | None = None
    spread: float | None = None
    batch_penalty: Verdict | None = None

    @property
    def sentences(self) -> list[str]:
        """Each finding in words."""
        found = []
        if self.noise_floor is not None:
            found.append(f"noise floor: {self.noise_floor.headline}")
        if self.batch_penalty is not None:
            found.append(f"batch: {penalty_sentence(self.batch_penalty)}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """What ``further.json`` holds."""
        found: dict[str, Any] = {}
        if self.noise_floor is not None:
            found["noise_floor"] = self.noise_floor.to_dict() | {"run_spread": self.spread}
        if self.batch_penalty is not None:
            found["batch_penalty"] = self.batch_penalty.to_dict() | {"sentence": penalty_sentence(self.batch_penalty)}
        return found


NOTHING_FURTHER = Further()
"""What is found before the runs for it are over."""


def noise_floor(spec: StudySpec, baseline: Arm, again: Arm, tokens: ArrayLike | None) -> tuple[Verdict, float | None]:
    """The baseline against itself with other seeds, and the spread of its runs.

    Args:
        baseline: Its verdict runs at the first look.
        again: Its runs with other seeds.
        tokens: ``(rows,)`` supervised tokens of the verdict rows.
    """
    seeds = spec.verdict_seeds(len(spec.aa_seeds))
    relabelled = again.relabelled(dict(zip(spec.aa_seeds, seeds, strict=True)))
    other = Arm(f"{baseline.name} with other seeds", relabelled.losses, relabelled.failed, baseline.base_loss)
    verdict = compare(other, baseline, band=spec.band, alpha=spec.plan.alpha, seeds=seeds, tokens=tokens)
    losses = [*baseline.means(tokens).values(), *again.means(tokens).values()]
    return verdict, stdev(losses) if len(losses) > 1 else None


def penalty(spec: StudySpec, arm: Callable[[str], Arm], seeds: Sequence[int], tokens: ArrayLike | None) -> Verdict:
    """Whether the large batch costs adapters more than full fine-tuning.

    Args:
        arm: Name of an arm to its verdict runs.
        seeds: The seeds that all four have.
        tokens: ``(rows,)`` supervised tokens of the verdict rows.
    """
    four: Mapping[str, Mapping[str, str]] = spec.batch_penalty
    large, small = ((arm(four["lora"][batch]), arm(four["full"][batch])) for batch in ("large", "small"))
    return batch_penalty(large, small, band=spec.band, alpha=spec.plan.alpha, seeds=seeds, tokens=tokens)
