"""What a study can show, said before it starts: the band, the seeds, and the spread that they need."""

from __future__ import annotations

from lightning_lora.study.statistics.power import chance_to_see_failures, chances, seeds_for, widest_spread
from lightning_lora.study.statistics.seed_plan import SeedPlan
from lightning_lora.study.statistics.verdict import nats
from lightning_lora.study.statistics.word import BAND, MIN_SEEDS, check_band


def before_start(plan: SeedPlan, band: float = BAND, spread: float | None = None) -> list[str]:
    """Lines to print before a study starts.

    Args:
        spread: Standard deviation over seeds of a paired difference, from a pilot, an A/A arm or an earlier study. None
            if unknown: the lines then say which spread would do.

    Raises:
        ConfigError: If the band is not a positive number.
    """
    check_band(band)
    last = plan.looks[-1]
    looks = ", ".join(map(str, plan.looks))
    seeds = f"{last} {'seed' if last == 1 else 'seeds'}" if len(plan.looks) == 1 else f"{looks} seeds, as needed"
    lines = [f"band {band:g} nats: differences inside of it count as none; {seeds}, one-sided level {plan.alpha:g}"]
    if last < MIN_SEEDS:
        return [*lines, f"no verdict: it takes at least {MIN_SEEDS} seeds"]
    if spread is None:
        widest = widest_spread(0.8, last, plan.alpha) * band
        lines.append(
            f"if nothing differs, {last} seeds say 'matches' in 8 of 10 studies where the spread between seeds is at "
            f"most {nats(widest, band)} nats; with a wider one mostly 'cannot tell'"
        )
    elif spread > 0:
        lines.append(_with_spread(plan, band, spread))
    lines.append(
        f"an arm that fails in 1 of 5 seeds shows it in {_share(chance_to_see_failures(0.2, last))} of the {last}-seed "
        f"studies"
    )
    return lines


def about_the_band(
    baseline: str, band: float, base_loss: float, final_loss: float, spread: float | None = None
) -> list[str]:
    """Lines that say what the band means here, once the baseline is known."""
    gain = base_loss - final_loss
    lines = [f"{baseline} gained {nats(gain, band)} nats"]
    if gain > 0:
        lines[0] += f"; the band is {band / gain:.1%} of that"
    if spread is not None:
        lines.append(
            f"single runs of {baseline} spread by {nats(spread, band)} nats (standard deviation over seeds): a "
            f"smaller difference does not matter to someone who trains once"
        )
    return lines


def _with_spread(plan: SeedPlan, band: float, spread: float) -> str:
    equal, behind = chances(plan, band, spread), chances(plan, band, spread, 2 * band)
    text = (
        f"with a spread of {nats(spread, band)} nats between seeds, {_share(equal.matches)} of the studies say "
        f"'matches' if nothing differs, and {_share(behind.behind)} say 'falls behind' if the truth is twice the band"
    )
    if len(plan.looks) > 1:
        return f"{text}; {equal.seeds:.1f} seeds in the mean"
    if equal.matches >= 0.8:
        return text
    return f"{text}; {seeds_for(0.8, band / spread, plan.alpha):,} seeds would say 'matches' in 8 of 10"


def _share(value: float) -> str:
    if value > 0.99:
        return "more than 99%"
    return "half" if 0.45 <= value <= 0.55 else f"{value:.0%}"
