"""Whether a large batch costs LoRA more than it costs full fine-tuning: a difference of differences."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.typing import ArrayLike

from lightning_lora.study.statistics.arm import Arm
from lightning_lora.study.statistics.compare import compare, differences
from lightning_lora.study.statistics.interval import ALPHA
from lightning_lora.study.statistics.verdict import Verdict, nats
from lightning_lora.study.statistics.word import BAND


def batch_penalty(
    large: tuple[Arm, Arm],
    small: tuple[Arm, Arm],
    *,
    band: float = BAND,
    alpha: float = ALPHA,
    seeds: Sequence[int] | None = None,
    tokens: ArrayLike | None = None,
) -> Verdict:
    """Compare the gap of two arms at a large batch with their gap at a small one.

    ``[lora(large) - full(large)] - [lora(small) - full(small)]`` by seed and row, each of the four at its own learning
    rate. Its spread is about sqrt 2 times that of one gap, so the same band takes twice the seeds.

    Args:
        large: LoRA and full fine-tuning at the large batch.
        small: The same at the small batch.
        band: Nats that count as equal.
        alpha: One-sided level.
        seeds: The seeds that were planned up to now. None: all that any of the four has.
        tokens: ``(rows,)`` supervised tokens of the verdict rows.

    Returns:
        The verdict about the gap: "behind" where LoRA loses more by the large batch than full fine-tuning does.

    Raises:
        DataError: If the arms were scored on different rows.
    """
    first, second = _gap(*large, "large", tokens), _gap(*small, "small", tokens)
    return compare(first, second, band=band, alpha=alpha, seeds=seeds, tokens=tokens)


def penalty_sentence(verdict: Verdict) -> str:
    """A verdict of `batch_penalty` in words."""
    if verdict.verdict == "cannot tell" or verdict.interval is None:
        return verdict.sentence
    low, high = sorted(abs(end) for end in (verdict.interval.low, verdict.interval.high))
    size, *ends = (nats(value, verdict.band) for value in (abs(verdict.interval.mean), low, high))
    if verdict.verdict == "matches":
        ends = (nats(end, verdict.band) for end in (verdict.interval.low, verdict.interval.high))
        return (
            f"the large batch costs LoRA as much as full fine-tuning within {verdict.band:g} nats: the difference is "
            f"{nats(verdict.interval.mean, verdict.band)} ({' to '.join(ends)})"
        )
    side = "more" if verdict.verdict == "behind" else "less"
    return f"the large batch costs LoRA {size} nats {side} than full fine-tuning ({' to '.join(ends)})"


def _gap(arm: Arm, baseline: Arm, batch: str, tokens: ArrayLike | None) -> Arm:
    """The differences of two arms as if they were the losses of one; a seed that diverged in either has none."""
    diverged = {seed for each in (arm, baseline) for seed in each.diverged(tokens)}
    both = sorted((arm.losses.keys() & baseline.losses.keys()) - diverged)
    missing = {seed: "diverged" for seed in diverged}
    missing |= {seed: "not run" for seed in (arm.losses.keys() ^ baseline.losses.keys()) - diverged}
    found = dict(zip(both, differences(arm, baseline, both), strict=True)) if both else {}
    problem = next((f"{each.problem} ({each.name})" for each in (arm, baseline) if each.problem), "")
    name = f"{arm.name} - {baseline.name} ({batch})"
    return Arm(name, found, missing | {**arm.failed, **baseline.failed}, problem=problem)
