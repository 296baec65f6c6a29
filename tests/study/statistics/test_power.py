"""The chance of each word, and what is printed before a study starts."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_lora.errors import ConfigError
from lightning_lora.study.statistics.before_start import about_the_band, before_start
from lightning_lora.study.statistics.power import chances, power_table, seeds_for, widest_spread
from lightning_lora.study.statistics.seed_plan import SeedPlan

# Simulated with 200,000 studies each: band / spread, "matches" of equal arms and "falls behind" at two bands, 3 seeds
# and 5 seeds.
SIMULATED = [
    (0.5, 0.02, 0.32, 0.02, 0.58),
    (0.75, 0.06, 0.53, 0.11, 0.86),
    (1.0, 0.13, 0.71, 0.29, 0.98),
    (1.25, 0.22, 0.85, 0.53, 1.0),
    (1.5, 0.33, 0.93, 0.74, 1.0),
    (2.0, 0.56, 0.99, 0.95, 1.0),
    (3.0, 0.88, 1.0, 1.0, 1.0),
    (4.0, 0.98, 1.0, 1.0, 1.0),
]


def test_the_chances_are_those_of_simulated_studies() -> None:
    rows = [[row[key] for key in ("ratio", "matches3", "behind3", "matches5", "behind5")] for row in power_table()]
    assert np.allclose(rows, SIMULATED, rtol=0, atol=0.0055)


def test_the_seeds_for_a_chance_are_the_fewest() -> None:
    found = {row["ratio"]: tuple(row[key] for key in ("n50", "n80", "n90")) for row in power_table((0.75, 1, 2, 3))}
    assert found == {0.75: (11, 17, 21), 1: (7, 11, 13), 2: (3, 4, 5), 3: (3, 3, 4)}
    assert chances(SeedPlan.of(11), 1.0, widest_spread(0.8, 11)).matches == pytest.approx(0.8, abs=1e-6)
    assert seeds_for(0.8, 0.5) == 36
    fewer, enough = (chances(SeedPlan.of(seeds), 0.5, 1.0).matches for seeds in (35, 36))
    assert fewer < 0.8 <= enough


def test_looks_at_3_5_and_8_seeds_keep_every_error_below_the_level() -> None:
    """Simulated elsewhere: .38, .86 and .98 "matches" of equal arms with 7.3, 6.2 and 5.1 seeds in the mean."""
    plan = SeedPlan.of("auto")
    for ratio, matches, seeds in ((1, 0.38, 7.3), (1.5, 0.86, 6.2), (2, 0.98, 5.1)):
        equal = chances(plan, ratio, 1.0)
        assert (equal.matches, equal.seeds) == pytest.approx((matches, seeds), abs=0.055)
        assert max(equal.behind, equal.ahead, chances(plan, ratio, 1.0, truth=ratio).matches) < 0.048


def test_what_the_seeds_can_show_is_said_before_the_start() -> None:
    assert before_start(SeedPlan.of(3)) == [
        "band 0.005 nats: differences inside of it count as none; 3 seeds, one-sided level 0.05",
        "if nothing differs, 3 seeds say 'matches' in 8 of 10 studies where the spread between seeds is at most 0.0019 "
        "nats; with a wider one mostly 'cannot tell'",
        "an arm that fails in 1 of 5 seeds shows it in half of the 3-seed studies",
    ]
    assert before_start(SeedPlan.of(3), spread=0.004)[1] == (
        "with a spread of 0.0040 nats between seeds, 22% of the studies say 'matches' if nothing differs, and 85% say "
        "'falls behind' if the truth is twice the band; 8 seeds would say 'matches' in 8 of 10"
    )
    assert before_start(SeedPlan.of("auto"), spread=0.004)[:2] == [
        "band 0.005 nats: differences inside of it count as none; 3, 5, 8 seeds, as needed, one-sided level 0.02",
        "with a spread of 0.0040 nats between seeds, 67% of the studies say 'matches' if nothing differs, and more "
        "than 99% say 'falls behind' if the truth is twice the band; 6.8 seeds in the mean",
    ]
    assert before_start(SeedPlan.of(2))[1:] == ["no verdict: it takes at least 3 seeds"]
    assert len(before_start(SeedPlan.of(3), spread=0.0)) == 2
    with pytest.raises(ConfigError, match="band must be a positive number"):
        before_start(SeedPlan.of(3), band=-1)


def test_what_the_band_means_is_said_beside_it() -> None:
    assert about_the_band("rank 64", 0.005, 2.2, 1.8, 0.003) == [
        "rank 64 gained 0.4000 nats; the band is 1.2% of that",
        "single runs of rank 64 spread by 0.0030 nats (standard deviation over seeds): a smaller difference does "
        "not matter to someone who trains once",
    ]
    assert about_the_band("rank 64", 0.005, 1.8, 1.9) == ["rank 64 gained -0.1000 nats"]
