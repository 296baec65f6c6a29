"""How to make a run again, and what its report does not show."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping

from lightning_lora.study.report.content import Block, Listing, Section, Table, Words
from lightning_lora.study.report.numbers import size, words
from lightning_lora.study.report.runs.run_record import CONFIG, RunRecord


def origin(run: RunRecord) -> Section:
    """Command, versions, data, files with hashes, and the whole config."""
    started = run.last_of("started") or {}
    blocks: list[Block] = []
    if command := started.get("command"):
        blocks.append(Listing("The command", shlex.join(command)))
    if run.config:
        # The folder's name only: the report is read in other places.
        again = f"lightning-lora fit --config {shlex.quote(CONFIG)}"
        blocks.append(Listing(f"The same run again, in a folder with this run's {CONFIG}", again))
    facts = [[words(name), words(value)] for name, value in _facts(run, started) if value]
    if facts:
        blocks.append(Table("origin", "Versions, machine and data", ["what", "value"], facts))
    if run.files:
        rows = [[words(file.name), size(file.size), words(file.sha256 or "-")] for file in run.files]
        blocks.append(Table("files", "Files of the run", ["file", "size", "SHA-256"], rows))
    if run.config_text:
        blocks.append(Listing(f"All options ({CONFIG})", run.config_text.rstrip(), is_folded=True))
    return Section("reproduce", "Reproduce", blocks or [Words("The run has recorded nothing to start it again with.")])


def limits(run: RunRecord) -> Section:
    """What a single run cannot show."""
    return Section("limits", "What this does not show", [Words(text) for text in _limits(run)])


def _facts(run: RunRecord, started: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    versions = started.get("versions") or run.manifest.get("versions") or {}
    assert isinstance(versions, Mapping)
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "device", str(started.get("device", ""))
    yield "seed", str(run.option("seed_everything") if run.config else "")
    yield "base, fingerprint of its weights", str(run.manifest.get("base_fingerprint") or "")
    data = started.get("data") or {}
    assert isinstance(data, Mapping)
    for name, digest in data.items():
        yield f"data, {name}", str(digest)


def _limits(run: RunRecord) -> Iterator[str]:
    yield (
        "This is one run with one seed: another seed gives other numbers, and by how much is not measured here. "
        "A difference between two such runs may be chance; lightning-lora study compares with several seeds."
    )
    yield "Nothing here says whether full fine-tuning, another rank or another learning rate would do better."
    if not run.losses.validation:
        yield "No validation loss was measured: the training loss does not show what the model does on other rows."
    elif run.losses.best and run.losses.best[0] != max(run.losses.validation):
        yield "The lowest validation loss was picked after the fact from several, and is a little too good for that."
    if not run.last_of("capacity_verdict"):
        yield "Whether the adapters have room was not measured: CapacityMonitor does (cli_configs/capacity.yaml)."
    if not run.last_of("noise_scale"):
        yield "The noise of the gradient was not measured: BatchSizeMonitor does (cli_configs/monitor.yaml)."
