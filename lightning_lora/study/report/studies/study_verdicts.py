"""The first lines of a study's report: the main verdict, what counts as equal, and all differences in one picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_lora.study.report.charts.interval_chart import Difference, interval_chart
from lightning_lora.study.report.content import Cell, Figure, Section, Table, Words, said
from lightning_lora.study.report.numbers import (
    NOTHING,
    WORDS,
    count,
    difference,
    nats,
    p_value,
    share,
    short,
    word_cell,
    words,
)
from lightning_lora.study.report.studies.study_facts import StudyFacts, headline, why_open, with_interval

_LONGEST = 200


def study_word(facts: StudyFacts) -> tuple[str, str]:
    """The main verdict in a word or two, and its tone."""
    verdict = facts.verdicts.get(facts.study.primary)
    if verdict is None:
        return "Unfinished", "open"
    word, tone = WORDS.get(str(verdict["verdict"]), (str(verdict["verdict"]), "open"))
    return word[:1].upper() + word[1:], tone


def study_verdict(facts: StudyFacts) -> Words:
    """The verdict of the main comparison, or how far the study is."""
    study = facts.study
    verdict = facts.verdicts.get(study.primary)
    if verdict is None:
        return said(
            "No verdict yet: {over} of {asked} runs are over", over=count(facts.over), asked=count(len(study.cells))
        )
    # The whole sentence is below: an error of a library may have ten lines.
    return Words(_short(headline(verdict)), _numbers(verdict))


def study_lede(facts: StudyFacts) -> Iterator[Words]:
    """What else has to be known at once."""
    study = facts.study
    if why := why_open(facts.verdicts[study.primary]) if study.primary in facts.verdicts else "":
        yield Words(f"{_short(why)}.".replace("….", "…"))
    seeds = [verdict["seeds"] for verdict in study.verdicts]
    alpha = next((each["alpha"] for each in study.verdicts if each.get("alpha")), None)
    text = "Differences below {band} nats count as none, which was fixed before the start."
    if seeds:
        text += " Verdicts rest on {seeds} fresh seeds, at learning rates that were chosen with other seeds and rows."
    if alpha is not None:
        text += " Intervals cover the true difference in {cover} of studies."
    cover = NOTHING if alpha is None else words(f"{1 - 2 * alpha:.0%}")
    number = (
        words(f"{min(seeds)} to {max(seeds)}") if seeds and min(seeds) < max(seeds) else count(max(seeds, default=0))
    )
    yield said(text, band=short(facts.band), seeds=number, cover=cover)
    open_runs = len(study.cells) - facts.over
    if open_runs and facts.study.primary in facts.verdicts:
        yield said(
            "The study is not finished: {open} of {asked} runs are open.",
            open=count(open_runs),
            asked=count(len(study.cells)),
        )
    if failed := facts.failures():
        yield said(
            "{failed} of {asked} runs failed; their reasons are below.",
            failed=count(len(failed)),
            asked=count(len(study.cells)),
        )


def differences(facts: StudyFacts) -> Figure | None:
    """The differences of all arms beside the band; None as long as there is none."""
    known = [verdict for verdict in facts.verdicts.values() if verdict["difference"] is not None]
    if not known:
        return None
    # The main comparison first: it is what the page is about.
    known.sort(key=lambda verdict: verdict["arm"] != facts.study.primary)
    rows = [
        Difference(
            str(verdict["arm"]),
            word_cell(verdict).text,
            float(verdict["difference"]),
            -math.inf if verdict["low"] is None else float(verdict["low"]),
            math.inf if verdict["high"] is None else float(verdict["high"]),
            facts.styles.get(str(verdict["arm"]), 0),
            with_interval(verdict),
            verdict["arm"] == facts.study.primary,
        )
        for verdict in known
    ]
    baseline = facts.study.baseline
    says = "; ".join(f"{each['arm']} {with_interval(each)}, {word_cell(each).text}" for each in known)
    return interval_chart(
        "differences",
        f"Loss of each arm minus that of {baseline}",
        f"{says}.",
        f"nats above {baseline}: less is better",
        rows,
        facts.band,
        _table(facts),
    )


def study_verdicts(facts: StudyFacts) -> Section | None:
    """All verdicts in words; None without any."""
    if not facts.verdicts:
        return None
    sentences = [
        Words(f"{headline(verdict)}{why and f': {why}'}.", _numbers(verdict))
        for verdict in facts.verdicts.values()
        for why in (why_open(verdict),)
    ]
    return Section("verdicts", "Verdicts", [*sentences, *_noise_floor(facts)])


def _noise_floor(facts: StudyFacts) -> Iterator[Words]:
    """The baseline against itself."""
    floor = facts.study.noise_floor
    if floor is None or floor["difference"] is None:
        return
    text = "Noise floor: {baseline} differs from itself, with other seeds, by {interval} nats."
    text += (
        " Its single runs spread by {spread} nats: below that a difference does not matter to somebody who trains once."
    )
    if floor.get("run_spread") is None:
        text = text.partition(" Its single")[0]
    interval = Cell(with_interval(floor), floor["difference"])
    yield said(text, baseline=words(str(facts.study.baseline)), interval=interval, spread=nats(floor.get("run_spread")))


def _short(text: str) -> str:
    return textwrap.shorten(text, _LONGEST, placeholder=" …")


def _table(facts: StudyFacts) -> Table:
    columns = ["arm", "verdict", "difference", "low", "high", "seeds", "spread over seeds"]
    columns += ["inside the band", "p", "p, corrected"]
    rows = [
        [
            words(str(verdict["arm"])),
            word_cell(verdict),
            *(difference(verdict[name]) for name in ("difference", "low", "high")),
            count(verdict["seeds"]),
            nats(verdict.get("spread")),
            share(verdict.get("inside_band")),
            *(p_value(verdict.get(name)) for name in ("p", "p_corrected")),
        ]
        for verdict in facts.verdicts.values()
    ]
    note = (
        "p is the chance of such numbers if the word were wrong; where several arms are compared, all but the main "
        "comparison are corrected by Holm. Inside the band: the chance that the true difference is there, if all were "
        "equally likely before; the verdict does not rest on it."
    )
    return Table(
        "verdict-numbers", f"Differences to {facts.study.baseline}, nats per supervised token", columns, rows, note
    )


def _numbers(verdict: Mapping[str, Any]) -> dict[str, Any]:
    return {name: nats(verdict[name]) for name in ("difference", "low", "high") if verdict[name] is not None}
