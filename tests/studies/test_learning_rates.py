"""What the table of norms reads off planted runs."""

from __future__ import annotations

from studies.learning_rates import norms_table


def line(arm: str, rate: float, seed: int, step: int, loss: str, ratio: float) -> dict[str, str]:
    values = {"rate": repr(rate), "seed": str(seed), "step": str(step), "loss": loss, "b_over_a": repr(ratio)}
    return {"arm": arm, **values}


def test_norms_are_those_at_the_rate_that_is_best_at_the_last_length_and_a_failed_rate_is_none() -> None:
    lines = [line("full", 1e-3, 1, step, "1.0", 0.0) for step in (0, 9)]
    for seed, ratio in ((1, 0.2), (2, 0.4)):
        for rate, early, late in ((1e-3, "2.0", "1.0"), (2e-3, "1.5", "1.5"), (4e-3, "1.0", "nan")):
            lines += [line("rank 4", rate, seed, 0, early, 0.0), line("rank 4", rate, seed, 9, late, ratio + rate)]
    _, _, *rows = norms_table(lines).splitlines()
    assert rows == ["| rank 4 | 0.001 | 0.000 | 0.301 |"]
