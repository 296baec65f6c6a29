"""Studies whose truth is planted get the right sentence."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.study.statistics.arm import Arm
from lightning_lora.study.statistics.compare import compare, corrected
from lightning_lora.study.statistics.seed_plan import SeedPlan
from lightning_lora.study.statistics.stays_behind import pointwise, stays_behind_after, with_tokens
from tests.study.statistics.arms import FULL, arm, pair

NAN = math.nan

SENTENCES: dict[str, tuple[tuple[Arm, Arm], str]] = {
    "a tie": (pair(0.001, 0.002, 0.0), "rank 16 matches full fine-tuning within 0.005 nats"),
    "a sure small loss": (
        pair(0.002, 0.003, 0.0025),
        "rank 16 matches full fine-tuning within 0.005 nats, slightly behind: 0.0025 (0.0017 to 0.0033)",
    ),
    "a sure small gain": (
        pair(-0.002, -0.003, -0.0025),
        "rank 16 matches full fine-tuning within 0.005 nats, slightly ahead: 0.0025 (0.0017 to 0.0033)",
    ),
    "a clear loss": (
        pair(0.010, 0.012, 0.008),
        "rank 16 falls behind full fine-tuning by 0.0100 nats (0.0066 to 0.0134)",
    ),
    "a clear win": (
        pair(-0.010, -0.012, -0.008),
        "rank 16 is ahead of full fine-tuning by 0.0100 nats (0.0066 to 0.0134)",
    ),
    "too much noise": (pair(0.001, 0.004, -0.002), "cannot tell: 3 seeds; 4 would do if the spread stays"),
    "a large noisy difference": (
        pair(0.006, 0.001, 0.009),
        "cannot tell: 3 seeds; the difference is as large as the band",
    ),
    "one heavy seed": (pair(0.001, 0.030, 0.002), "cannot tell: 3 seeds; the difference is as large as the band"),
    "one seed far off on both sides": (
        pair(0.001, -0.02, 0.02, 0.0, -0.001),
        "cannot tell: 5 seeds; 24 would do if the spread stays",
    ),
    "two seeds": (pair(0.001, 0.001), "cannot tell: 2 seeds; at least 3 are needed"),
    "one seed": (pair(0.001), "cannot tell: 1 seed; at least 3 are needed"),
    "a failed arm": (
        (Arm("rank 16", {}, dict.fromkeys(range(3), "CUDA out of memory")), arm(FULL, 1.0, 1.0, 1.0)),
        "cannot tell: rank 16 has no result for seeds 0, 1, 2 (CUDA out of memory)",
    ),
    "an arm that misses a seed": (
        (arm("rank 16", 1.0, 1.0), arm(FULL, 1.0, 1.0, 1.0)),
        "cannot tell: rank 16 has no result for seed 2 (not run)",
    ),
    "a baseline that misses a seed of five": (
        (arm("rank 16", 1.0, 1.0, 1.0, 1.0, 1.0), Arm(FULL, dict.fromkeys(range(4), 1.0), {4: "killed 5 times"})),
        "cannot tell: full fine-tuning has no result for seed 4 (killed 5 times)",
    ),
    "an optimum at the edge": (
        pair(0.001, 0.002, 0.0, problem="best rate at the edge of the sweep, 0.003"),
        "cannot tell: best rate at the edge of the sweep, 0.003 (rank 16)",
    ),
    "a diverged seed": (
        pair(0.001, NAN, 0.0),
        "cannot tell: unstable: diverged in 1 of 3 seeds at its best rate",
    ),
    "a seed worse than the base": (
        pair(0.001, 0.9, 0.0, base_loss=1.5),
        "cannot tell: unstable: diverged in 1 of 3 seeds at its best rate",
    ),
    "most seeds diverged": (
        pair(0.001, NAN, math.inf),
        "rank 16 falls behind full fine-tuning: diverged in 2 of 3 seeds at its best rate",
    ),
    "all seeds diverged": (
        pair(NAN, NAN, NAN),
        "rank 16 falls behind full fine-tuning: diverged in 3 of 3 seeds at its best rate",
    ),
    "behind in the seeds that did not diverge": (
        pair(0.010, 0.012, 0.008, NAN),
        "rank 16 falls behind full fine-tuning by 0.0100 nats (0.0066 to 0.0134); unstable: diverged in 1 of 4 seeds "
        "at its best rate",
    ),
    "ahead in the seeds that did not diverge": (
        pair(-0.010, -0.012, -0.008, NAN),
        "cannot tell: unstable: diverged in 1 of 4 seeds at its best rate",
    ),
    "a baseline that diverged": (
        (arm("rank 16", 1.0, 1.0, 1.0), arm(FULL, 1.0, NAN, NAN)),
        "cannot tell: full fine-tuning diverged in 2 of 3 seeds at its best rate",
    ),
}


@pytest.mark.parametrize("study", SENTENCES)
def test_a_planted_study_gets_its_sentence(study: str) -> None:
    arms, sentence = SENTENCES[study]
    verdict = compare(*arms)
    assert verdict.sentence == sentence
    assert verdict.headline.startswith("rank 16")
    assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))["sentence"] == sentence


def test_arms_that_differ_in_what_must_be_equal_get_no_verdict() -> None:
    assert compare(*pair(0.0, 0.0, 0.001), unequal="precision").sentence == "cannot tell: the arms differ in precision"


def test_the_band_is_the_one_that_was_fixed() -> None:
    assert compare(*pair(0.010, 0.012, 0.008), band=0.02).sentence.startswith(
        "rank 16 matches full fine-tuning within 0.02 nats, slightly behind: 0.0100 (0.0066"
    )
    assert "by 0.00020 nats (0.00003 to 0.00037)" in compare(*pair(0.0002, 0.0003, 0.0001), band=0.0003).sentence
    with pytest.raises(ConfigError, match="band must be a positive number of nats"):
        compare(*pair(0.0, 0.0, 0.0), band=0.0)


@pytest.mark.parametrize("noise", [1, 2, 4, 8, 16, 64, 1000])
def test_more_noise_leads_to_cannot_tell_and_never_to_matches(noise: float) -> None:
    """A tolerance that grows with the noise would call any noisy arm harmless."""
    spread = noise * 0.001 * np.array([1.0, -1.0, 0.0])
    assert compare(*pair(*spread)).verdict == ("matches" if noise <= 2 else "cannot tell")
    assert compare(*pair(*(spread + 0.02))).verdict == ("behind" if noise <= 8 else "cannot tell")


def rows_of(name: str, losses: np.ndarray) -> Arm:
    return Arm(name, dict(enumerate(losses)))


def test_rows_that_all_seeds_share_widen_the_interval() -> None:
    """Every seed says the same, because every seed sees the same rows: other rows would say something else."""
    rng = np.random.default_rng(0)
    by_row = 0.05 * rng.standard_normal((1, 64))
    found = by_row - by_row.mean() + 0.001 * rng.standard_normal((3, 64))
    verdict = compare(rows_of("rank 16", 1 + found), rows_of(FULL, np.ones((3, 64))))
    assert verdict.sentence == "cannot tell: 3 seeds and 64 rows; 918 rows would do if the spread stays"
    assert compare(rows_of("rank 16", 1 + found.mean(1)), rows_of(FULL, np.ones(3))).verdict == "matches"


def test_losses_are_weighed_by_tokens() -> None:
    losses, tokens = np.array([[1.0, 2.0], [1.1, 2.0], [1.2, 2.0]]), [3, 1]
    found = rows_of("rank 16", losses)
    assert found.means(tokens) == pytest.approx({0: 1.25, 1: 1.325, 2: 1.4})
    assert found.worst(tokens) == (2, pytest.approx(1.4))
    interval = compare(found, rows_of(FULL, np.ones((3, 2))), tokens=tokens).interval
    assert interval is not None
    assert interval.mean == pytest.approx(0.325)
    with pytest.raises(DataError, match="rank 16, seed 0, has 2 rows, and tokens have"):
        found.means([1, 2, 3])


def test_the_worst_seed_is_the_one_that_diverged() -> None:
    seed, loss = arm("rank 16", 1.0, NAN, 9.0).worst() or (0, 0.0)
    assert (seed, math.isnan(loss)) == (1, True)
    assert arm("rank 16").worst() is None


def test_arms_scored_on_other_rows_are_refused() -> None:
    with pytest.raises(DataError, match=r"scored on different numbers of rows \(\[2, 3\]\)"):
        compare(rows_of("rank 16", np.ones((3, 2))), rows_of(FULL, np.ones((3, 3))))


def test_seeds_beyond_the_look_do_not_count() -> None:
    arms = pair(0.001, 0.002, 0.0, 0.9, 0.9)
    assert compare(*arms, seeds=range(3)).verdict == "matches"
    assert compare(*arms).verdict == "cannot tell"


def test_an_arm_is_compared_with_itself_on_other_seeds() -> None:
    full = arm(FULL, 1.001, 1.0, 1.002, 1.0, 1.001, 1.0)
    first, second = Arm(FULL, {seed: full.losses[seed] for seed in range(3)}), Arm("again", dict(full.losses))
    assert compare(second.relabelled({3: 0, 4: 1, 5: 2, 0: 3, 1: 4, 2: 5}), first, seeds=range(3)).spread == (
        pytest.approx(np.std([-0.001, 0.001, -0.002], ddof=1))
    )


def test_a_further_comparison_must_stand_among_all() -> None:
    """The primary one keeps its level; the others share one."""
    tie, edge = compare(*pair(0.001, 0.002, 0.0)), compare(*pair(0.0033, 0.0001, 0.0017))
    assert (tie.verdict, edge.verdict) == ("matches", "matches")
    verdicts = [replace(tie, arm="rank 64"), replace(edge, arm="rank 1"), replace(tie, arm="rank 4")]
    found = corrected([*verdicts, compare(*pair(0.0, 0.0))], primary="rank 64")
    assert [each.verdict for each in found] == ["matches", "matches", "matches", "cannot tell"]
    noisy = replace(compare(*pair(0.001, 0.004, -0.002)), arm="rank 2")
    found = corrected([*verdicts, noisy], primary="rank 64")
    assert [each.verdict for each in found] == ["matches", "cannot tell", "matches", "cannot tell"]
    told = "cannot tell (3 comparisons): it would match as the only comparison, more seeds may tell"
    assert found[1].sentence == told
    assert found[0].p_corrected is None
    assert [each.p_corrected for each in found[1:]] == pytest.approx(
        [2 * (edge.p or 0), 3 * (tie.p or 0), noisy.p], rel=1e-6
    )


def test_seeds_are_added_only_where_they_were_planned_and_nobody_can_tell_yet() -> None:
    plan = SeedPlan.of("auto")
    assert (plan.looks, plan.alpha) == ((3, 5, 8), 0.02)
    tie = compare(*pair(0.0001, 0.0002, 0.0), alpha=plan.alpha)
    noisy = compare(*pair(0.001, 0.003, -0.001), alpha=plan.alpha)  # "matches" at level .05
    edge = compare(*pair(0.001, 0.002, 0.0, problem="best rate at the edge of the sweep"), alpha=plan.alpha)
    assert (tie.verdict, noisy.verdict, edge.verdict) == ("matches", "cannot tell", "cannot tell")
    assert [verdict.is_open for verdict in (tie, noisy, edge)] == [False, True, False]
    assert SeedPlan.of(3) == SeedPlan((3,), 0.05)
    for wrong in (0, -1, 2.5, True, "many"):
        with pytest.raises(ConfigError, match="seeds must be a number of at least 3 for a verdict, or auto"):
            SeedPlan.of(wrong)  # pyright: ignore[reportArgumentType]


def test_a_verdict_says_since_when_an_arm_is_behind() -> None:
    tokens = [1e3, 1e4, 1e5, 1e6, 1e7]
    gaps = [0.0, 0.01, 0.0, 0.01, 0.012]
    intervals = pointwise([np.array([gap, gap + 0.001, gap - 0.001]) for gap in gaps])
    assert stays_behind_after(tokens, intervals) == 1e6
    verdict = with_tokens(compare(*pair(0.010, 0.012, 0.008)), tokens, intervals)
    assert verdict.sentence == (
        "rank 16 falls behind full fine-tuning by 0.0100 nats (0.0066 to 0.0134) after 1,000,000 tokens"
    )
    assert stays_behind_after(tokens, pointwise([[0.01, 0.011, 0.012]] * 5)) == 1e3
    assert stays_behind_after(tokens, pointwise([[0.01, 0.011, 0.012]] * 4 + [[0.0, 0.1, -0.1]])) is None
    assert with_tokens(compare(*pair(0.001, 0.002, 0.0)), tokens, intervals).after_tokens is None
