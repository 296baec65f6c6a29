"""How to make a study again, and what it does not show."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from lightning_lora.files.adapter.manifest import MANIFEST_FILE
from lightning_lora.files.atomic import sha256
from lightning_lora.study.matched.record import CHOICES, RESULTS, STUDY, VERDICTS
from lightning_lora.study.report.content import Block, Listing, Section, Table, Words
from lightning_lora.study.report.numbers import words
from lightning_lora.study.report.studies.study_facts import StudyFacts
from lightning_lora.study.statistics.before_start import before_start
from lightning_lora.study.statistics.seed_plan import SeedPlan


def study_origin(facts: StudyFacts) -> Section:
    """Commands, versions, fingerprints, seeds, and the whole study file."""
    spec = facts.study.spec
    made = dict(spec.get("made") or {})
    command = made.pop("command", "lightning-lora study FILE.yaml")
    command = command if isinstance(command, str) else shlex.join(command)
    rows = [[words(name), words(text)] for name, text in _flat(made)]
    rows += [[words(name), words(text)] for name, text in _seeds(facts)]
    rows += [[words("base, fingerprint of its weights"), words(text)] for text in _fingerprints(facts)]
    hashes = sorted({cell.rows_hash for cell in facts.study.cells} - {""})
    rows += [[words("held-out rows, SHA-256 of what they hold"), words(text)] for text in hashes]
    rows += [[words(f"SHA-256 of {name}"), words(sha256(facts.study.folder / name))] for name in _files(facts)]
    again = re.sub(r"^\S*lightning_lora/__main__\.py", "lightning-lora", command)
    blocks: list[Block] = [Listing("The command; given again, it goes on with what is not finished", again)]
    if rows:
        blocks.append(Table("origin", "How it was made", ["what", "value"], rows))
    text = yaml.safe_dump(_plain(spec), sort_keys=False, allow_unicode=True)
    blocks.append(Listing(f"The whole study ({STUDY})", text.rstrip(), is_folded=True))
    return Section("reproduce", "Reproduce", blocks)


def _seeds(facts: StudyFacts) -> Iterator[tuple[str, str]]:
    for name in ("seeds", "selection_seeds"):
        if name in facts.study.spec:
            given = facts.study.spec[name]
            yield name.replace("_", " "), ", ".join(map(str, given)) if isinstance(given, list) else str(given)
    verdict = sorted({cell.seed for cell in facts.study.cells if cell.phase == "verdict"})
    yield "seeds of the verdict runs", ", ".join(map(str, verdict))


def _fingerprints(facts: StudyFacts) -> list[str]:
    """The fingerprints of the base weights that adapters of the study were trained on; one, if all is well."""
    found = set()
    for cell in facts.study.cells:
        file = facts.study.run_folder(cell) / "adapters" / "last" / MANIFEST_FILE
        if cell.phase == "verdict" and file.is_file():
            found.add(str(json.loads(file.read_text(encoding="utf-8")).get("base_fingerprint") or ""))
    return sorted(found - {""})


def _files(facts: StudyFacts) -> list[str]:
    return [name for name in (STUDY, RESULTS, CHOICES, VERDICTS) if (facts.study.folder / name).is_file()]


def study_limits(facts: StudyFacts) -> Section:
    """What the study does not show."""
    return Section("limits", "What this does not show", [Words(text) for text in _limits(facts)])


def _limits(facts: StudyFacts) -> Iterator[str]:
    spec = facts.study.spec
    yield (
        "The verdicts speak of this data, this base, this number of steps and this optimizer, not of LoRA as such; and "
        "of a loss on held-out rows, not of what the model does with its answers."
    )
    if "looks" in spec and "alpha" in spec:
        for line in before_start(SeedPlan(tuple(spec["looks"]), float(spec["alpha"])), facts.band, facts.pair_spread):
            yield f"{line[:1].upper()}{line[1:]}."
    if before := spec.get("seeds_before"):
        yield (
            f"The seeds were changed after verdicts had been seen (before: {', '.join(map(str, before))}). Each look "
            "is one more chance to be wrong, and the level does not pay for it: only seeds: auto does."
        )
    yield (
        "Intervals hold for differences that are about symmetric over seeds. No method sees a failure that did not "
        "occur: read the worst seed beside each mean."
    )
    yield "Times and memory are those of the machines that ran, which may have had other work."


def _flat(given: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as names and texts."""
    for name, value in given.items():
        if name == "versions" and isinstance(value, Mapping):
            yield name, ", ".join(f"{library} {version}" for library, version in value.items())
        elif isinstance(value, Mapping):
            yield from _flat(value, "SHA-256 of " if name == "data_sha256" else f"{above}{name}, ")
        else:
            yield f"{above}{name}", " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _plain(value: Any) -> Any:
    """The same in types that YAML has."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
