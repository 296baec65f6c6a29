"""The first lines of a run's report: what came out, how the run ended, and its settings in a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from lightning_lora.study.report.content import Cell, Section, Table, Words, said
from lightning_lora.study.report.numbers import count, nats, rate, seconds, size, words
from lightning_lora.study.report.runs.batch_panel import batch_state, samples_of_last_start
from lightning_lora.study.report.runs.run_record import RunRecord

_ENDINGS = {
    "done": "The run is finished.",
    "stopped": "The run was stopped before its end; it can be continued from its last checkpoint.",
    "failed": "The run failed",
    "running": "The run goes on; these are the numbers so far",
    "killed": "The run has left no word about its end: it was killed, or the machine stopped.",
    "unknown": "",
}
_LANGUAGE = "CausalLM"


def run_verdict(run: RunRecord) -> Words:
    """What came out, in one sentence."""
    losses = run.losses
    validation = {step: loss for step, loss in sorted(losses.validation.items()) if math.isfinite(loss)}
    if len(validation) > 1:
        best = losses.best
        assert best is not None
        (first, before), (last, after) = next(iter(validation.items())), next(reversed(validation.items()))
        text = "Validation loss {moved} from {before} at step {first} to {after}{unit} at step {last}"
        text += "" if best[0] == last else "; the lowest was {best} at step {at}"
        cells = {"before": nats(before), "after": nats(after), "best": nats(best[1])}
        places = {"first": count(first), "last": count(last), "at": count(best[0])}
        return said(text, moved=words(_moved(before, after)), unit=words(loss_unit(run)), **cells, **places)
    if validation:
        ((last, after),) = validation.items()
        return said(
            "Validation loss is {after}{unit} at step {last}",
            after=nats(after),
            last=count(last),
            unit=words(loss_unit(run)),
        )
    train = [loss for _, loss in sorted(losses.train.items()) if math.isfinite(loss)]
    if train:
        few = max(1, len(train) // 20)
        before, after = fmean(train[:few]), fmean(train[-few:])
        return said(
            "Training loss {moved} from {before} to {after}{unit} in {steps} steps; nothing was validated",
            moved=words(_moved(before, after)),
            before=nats(before),
            after=nats(after),
            unit=words(loss_unit(run)),
            steps=count(losses.last_step),
        )
    return Words("The run has logged no loss")


def run_word(run: RunRecord) -> tuple[str, str]:
    """How the run ended in a word, with its tone, where that has to be seen first."""
    known = {"stopped": ("Stopped", "open"), "failed": ("Failed", "bad"), "killed": ("Killed", "bad")}
    return known.get(run.ending, ("", "open"))


def run_lede(run: RunRecord) -> Iterator[Words]:
    """How the run ended, and what its monitors say."""
    text = _ENDINGS[run.ending]
    if run.ending == "failed":
        text += f": {run.all_of('ended')[-1].get('reason') or 'no reason is recorded'}"
    if run.ending == "running":
        planned = (run.last_of("started") or {}).get("steps_planned")
        text += ", at step {done} of {planned}." if planned else ", at step {done}."
        yield said(text, done=count(run.losses.last_step), planned=count(planned))
    elif text:
        yield Words(text)
    if event := run.last_of("capacity_verdict"):
        yield Words(_sentence(str(event["sentence"])))
    if samples := samples_of_last_start(run):
        yield batch_state(samples[-1])
    if event := run.last_of("batch_probe"):
        yield said("A probe found batches up to {rows} rows harmless.", rows=count(event["largest_harmless"]))


def run_settings(run: RunRecord) -> Section:
    """Settings, cost and losses of a run in one table."""
    rows = [[words(name), cell] for name, cell in _settings(run) if cell.text not in ("", "-")]
    return Section("run", "The run", [Table("settings", "Settings and results", ["what", "value"], rows)])


def loss_unit(run: RunRecord) -> str:
    """The unit of a loss, with a space before it; nothing where only the module of the user knows."""
    return " nats" if str(run.option("model", "class_path")).rpartition(".")[2] == _LANGUAGE else ""


def _settings(run: RunRecord) -> Iterator[tuple[str, Cell]]:
    lora = run.manifest.get("config") or run.option("model", "init_args", "lora") or {}
    model, data = (("model", "init_args"), ("data", "init_args"))
    yield "model", words(str(run.option(*model, "model") or run.option("model", "class_path") or ""))
    for name in ("train", "validation"):
        yield f"{name} data", words(_listed(run.option(*data, name)))
    yield "method", words(_method(run, lora))
    full = run.option(*model, "learning_rate")
    if isinstance(full, (int, float)):
        yield "learning rate, in terms of full fine-tuning", rate(full)
        if lora.get("lr_multiplier"):
            yield "learning rate of the adapters", rate(float(f"{full * lora['lr_multiplier']:.12g}"))
    if event := run.last_of("batch"):
        yield "rows per optimizer step", count(event["batch/rows"])
    measured = (run.last_of("planned_and_measured") or {}).get("measured") or {}
    yield "optimizer steps", count(run.losses.last_step or None)
    effort = run.losses.effort.get(max(run.losses.effort, default=0))
    yield "supervised tokens", count(measured.get("tokens") or (effort[0] if effort else None))
    yield "seconds of training", seconds(measured.get("seconds") or (effort[1] if effort else None))
    yield (
        "trained parameters",
        count(measured.get("trained_parameters") or (run.last_of("started") or {}).get("trained_parameters")),
    )
    yield "peak memory", size(measured.get("peak_bytes"))
    adapters = [file.size for file in run.files if file.name.startswith("adapters/last/")]
    yield "adapter on disk", size(sum(adapters) or None)
    if run.losses.best is not None:
        step, best = run.losses.best
        yield "lowest validation loss", nats(best)
        yield "at step", count(step)


def _method(run: RunRecord, lora: dict[str, object]) -> str:
    if not lora:
        return "full fine-tuning" if run.config else ""
    kind = "QLoRA" if run.option("model", "init_args", "quantization") else "LoRA"
    return f"{kind}, rank {lora.get('rank')}, alpha {lora.get('alpha'):g}, targets {_listed(lora.get('targets'))}"


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)


def _moved(before: float, after: float) -> str:
    return "fell" if after < before else "rose" if after > before else "stayed"


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."
