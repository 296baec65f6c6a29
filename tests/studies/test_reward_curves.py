"""What tables of runs with rewards read off planted curves."""

from __future__ import annotations

from studies.modules.reward_curves import (
    at_best,
    best_rate,
    controls_table,
    gaps_table,
    runs_of,
    runs_table,
    shuffled_table,
)

STEPS = (0, 50, 100, 150)


def run(
    arm: str, rate: float, seed: int, sampled: tuple[float, float], greedy: float = 0.5, control: str = "none"
) -> list[dict[str, str]]:
    """A run whose sampled accuracy is 0.25 at the start, 0 at step 50, and then ``sampled``."""
    settings = {"control": control, "arm": arm, "rate": repr(rate), "seed": str(seed), "trained": "100", "bits": "50"}
    return [
        settings | {"step": str(step), "val_reward": repr(value), "val_reward_greedy": repr(greedy), "entropy": entropy}
        for step, value, entropy in zip(STEPS, (0.25, 0.0, *sampled), ("", "1.0", "0.5", "0.125"), strict=True)
    ]


def planted() -> list[dict[str, str]]:
    lines: list[dict[str, str]] = []
    for seed, gap in ((0, 0.0), (1, 0.1)):
        lines += run("full", 1e-4, seed, (0.5, 0.7), greedy=0.75)
        for arm in ("r1+head", "r8+head", "r1", "r8"):
            lines += run(arm, 1e-3, seed, (0.5 - gap, 0.7 - gap))
    # The second seed likes another rate: the first one chooses.
    lines += run("full", 3e-4, 0, (0.4, 0.4)) + run("full", 3e-4, 1, (1.0, 1.0))
    lines += (
        run("full", 3e-5, 0, (0.4, 0.4)) + run("r1+head", 3e-3, 0, (0.0, 1.0)) + run("r1+head", 3e-3, 1, (0.0, 1.0))
    )
    return lines


def test_the_rate_is_chosen_by_the_score_of_the_first_seed_and_an_edge_is_told() -> None:
    runs = runs_of(planted())
    assert best_rate(runs, "full") == (1e-4, True)
    # The last evaluation alone would have chosen 3e-3.
    assert best_rate(runs, "r1+head") == (1e-3, False)
    assert {seed: run.score("val_reward") for seed, run in at_best(runs, "full").items()} == {0: 0.6, 1: 0.6}


def test_a_rate_with_fewer_seeds_is_not_chosen() -> None:
    lines = planted() + run("full", 2e-4, 0, (0.9, 0.9))
    assert best_rate(runs_of(lines), "full") == (1e-4, True)


def test_differences_are_paired_by_seed_and_carry_their_error() -> None:
    _, _, *rows = gaps_table(planted()).splitlines()
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    # Differences of 0 and -0.1: their error is 0.05, and t at 0.95 with one degree of freedom is 6.314.
    assert cells == [
        "r1+head - full",
        "2",
        "-0.050 (0.050; -0.366 to +0.266)",
        "-0.250 (0.000; -0.250 to -0.250)",
        "at an edge of the grid: r1+head",
    ]


def test_one_seed_has_no_error() -> None:
    lines = [line for line in planted() if line["seed"] == "0"]
    assert "| r1+head - full | 1 | +0.000 (one seed) | -0.250 (one seed) |" in gaps_table(lines)


def test_a_run_shows_its_start_its_score_and_its_end() -> None:
    assert "| full | 100 | **0.0001** | 0 | 0.250 | 0.600 | 0.700 | 0.750 |" in runs_table(planted())
    assert runs_table(planted()).count("| 0.125 | 0.50 |") == len(runs_of(planted()))


def test_controls_have_a_table_of_their_own_and_choose_no_rate() -> None:
    lines = planted() + run("r1+head", 1e-2, 0, (1.0, 1.0), control="shuffled")
    assert best_rate(runs_of(lines), "r1+head") == (1e-3, False)
    # sqrt(0.25 * 0.75 / 512)
    assert "+0.750 (s.e. 0.019)" in controls_table(lines)
    assert controls_table(lines).count("\n") == 2


def test_a_pair_of_arms_that_was_not_run_has_no_difference() -> None:
    lines = [line for line in planted() if line["arm"] in ("full", "r1")]
    assert [row.split("|")[1].strip() for row in gaps_table(lines).splitlines()[2:]] == ["r1 - full"]


def test_right_and_shuffled_rewards_are_compared_at_the_same_rate_seed_by_seed_and_on_the_whole() -> None:
    lines: list[dict[str, str]] = []
    for seed, wrong in ((0, 0.2), (1, 0.1)):
        lines += run("full", 1e-5, seed, (0.3, 0.5)) + run("full", 1e-5, seed, (0.2, wrong), control="shuffled")
    lines += run("full", 1e-4, 0, (0.0, 0.0), control="shuffled")
    _, _, *rows = shuffled_table(lines).splitlines()
    # sqrt((0.25 * 0.75 + 0.5 * 0.5) / 512) and so on; the mean of two has the root of the sum of squares, by two.
    right, greedy = "+0.250 (s.e. 0.029) | yes", "+0.000 (s.e. 0.031)"
    assert rows == [
        f"| full | 1e-05 | 0 | {right} | {greedy} | -0.050 (s.e. 0.026) | yes | {greedy} |",
        f"| full | 1e-05 | 1 | {right} | {greedy} | -0.150 (s.e. 0.023) | no | {greedy} |",
        "| full | 1e-05 | mean | +0.250 (s.e. 0.021) | yes | +0.000 (s.e. 0.022) "
        "| -0.100 (s.e. 0.017) | no | +0.000 (s.e. 0.022) |",
        f"| full | 0.0001 | 0 | not run |  |  | -0.250 (s.e. 0.019) | no | {greedy} |",
    ]
