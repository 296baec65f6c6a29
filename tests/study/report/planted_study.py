"""Study folders whose truth is known: arms, sweeps, verdict runs and curves, judged as a real study is."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from numpy.random import default_rng

from lightning_lora.files.safetensors_file import write_tensors
from lightning_lora.study.matched.record import (
    CHOICES,
    COLUMNS,
    CURVE,
    FURTHER,
    RESULTS,
    ROW_LOSSES,
    RUNS,
    STUDY,
    UNTRAINED,
    VERDICTS,
    read_study,
)
from lightning_lora.study.statistics.arm import Arm
from lightning_lora.study.statistics.compare import compare, corrected
from tests.study.report.planted_run import plant_run

BASELINE = "full fine-tuning"
BASE_LOSS = 2.4
RATES = (1e-4, 3e-4, 9e-4)
EVALUATIONS = (10, 20, 40, 70, 100)


def plant(
    folder: Path,
    gaps: Mapping[str, float],
    seeds: int = 3,
    spread: float = 0.001,
    failed: Mapping[tuple[str, int], str] | None = None,
    problem: Mapping[str, str] | None = None,
) -> Path:
    """Write a study in which each arm of ``gaps`` is that many nats above full fine-tuning.

    Args:
        folder: The study folder.
        gaps: Arm to its true difference.
        seeds: Verdict seeds.
        spread: Standard deviation over seeds of a difference.
        failed: Arm and verdict seed to the reason of a failed run.
        problem: Arm to why its rate cannot carry a verdict.
    """
    failed, problem, numbers = failed or {}, problem or {}, default_rng(0)
    names = [BASELINE, *gaps]
    losses: dict[str, dict[int, float]] = {name: {} for name in names}
    lines = [_base(folder)]
    for place, name in enumerate(names):
        for number, rate in enumerate(RATES):
            bowl = 0.04 * (number - 1) ** 2
            lines.append(_run(folder, name, rate, 0, "selection", 1.4 + gaps.get(name, 0.0) + bowl, place))
        for seed in range(1, seeds + 1):
            if (name, seed) in failed:
                lines.append(_line(name, 3e-4, seed, "verdict", "failed", reason=failed[name, seed]))
                continue
            loss = 1.4 + gaps.get(name, 0.0) + 0.01 * seed
            loss += float(numbers.normal(0, spread)) if name != BASELINE else 0.0
            losses[name][seed] = loss
            lines.append(_run(folder, name, 3e-4, seed, "verdict", loss, place))
    bad = {name: {seed: reason for (arm, seed), reason in failed.items() if arm == name} for name in names}
    arms = {name: Arm(name, losses[name], bad[name], BASE_LOSS, problem.get(name, "")) for name in names}
    verdicts = [compare(arms[name], arms[BASELINE], seeds=range(1, seeds + 1)) for name in gaps]
    verdicts = corrected(verdicts, names[-1])
    with (folder / RESULTS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    steps = {"target": 1.5, "ratio": 1.25, "low": 1.1, "high": None, "bound": "at least", "seeds": 3, "not_reached": 1}
    found = [verdict.to_dict() | {"steps_to_loss": steps} for verdict in verdicts]
    (folder / VERDICTS).write_text(json.dumps(found))
    chosen = {
        name: {
            "chosen_rate": 3e-4,
            "why": "1e-4 and 9e-4 are worse",
            "problem": problem.get(name, ""),
            "expected_best": [1.5, 1.42, 1.4],
        }
        for name in names
    }
    (folder / CHOICES).write_text(json.dumps(chosen))
    (folder / STUDY).write_text(yaml.safe_dump(_study(names, seeds), sort_keys=False))
    return folder


def _study(names: list[str], seeds: int) -> dict[str, Any]:
    arms = {
        name: {
            "overrides": {} if name == BASELINE else {"model.init_args.lora.rank": 2 ** (3 * place)},
            "learning_rates": list(RATES),
            "config": {},
        }
        for place, name in enumerate(names)
    }
    made = {
        "command": ["lightning-lora", "study", "planted.yaml"],
        "versions": {"torch": "2.13.0", "lightning": "2.6.6"},
        "data": {"train.jsonl": "ab" * 32},
    }
    return {
        "name": "planted",
        "baseline": BASELINE,
        "primary": names[-1],
        "band": 0.005,
        "seeds": seeds,
        "looks": [seeds],
        "alpha": 0.05,
        "selection_seeds": [0],
        "made": made,
        "arms": arms,
    }


def _base(folder: Path) -> dict[str, Any]:
    line = _line(UNTRAINED, 0.0, 0, "base", "done", BASE_LOSS)
    rows, tokens = torch.full((8,), 10 * BASE_LOSS, dtype=torch.float64), torch.full((8,), 10)
    tensors = {"loss_sum": rows, "tokens": tokens, "selection": torch.arange(8) % 2 == 0}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = folder / RUNS / line["run"] / ROW_LOSSES
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors.items(), layout, {})
    return line


def _run(folder: Path, arm: str, rate: float, seed: int, phase: str, loss: float, place: int) -> dict[str, Any]:
    line = _line(arm, rate, seed, phase, "done", loss, place)
    path = folder / RUNS / line["run"] / CURVE
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ["step,tokens,seconds,train_loss,val_loss"]
    for step in EVALUATIONS:
        height = loss + (BASE_LOSS - loss) * math.exp(-step / (20 + 4 * place))
        rows.append(f"{step},{step * 400},{step * (0.5 + 0.1 * place):.3f},,{height!r}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return line


def _line(
    arm: str,
    rate: float,
    seed: int,
    phase: str,
    state: str,
    loss: float | None = None,
    place: int = 0,
    reason: str = "",
) -> dict[str, Any]:
    run = f"{phase}-{place}-{rate:g}-{seed}"
    line = {"arm": arm, "learning_rate": f"{rate:g}", "seed": seed, "state": state, "phase": phase, "attempt": 1}
    line |= {"reason": reason, "run": run, "key": run, "loss": "" if loss is None else repr(loss)}
    line |= {"rows_hash": "cd" * 32 if state == "done" else ""}
    if state == "done" and phase != "base":
        line |= {"steps": 100, "seconds": 50 + 10 * place, "peak_bytes": 600 * 2**20 - 40 * 2**20 * place}
        line |= {
            "trained_parameters": 1_900_000 // (1 + place),
            "tokens": 40_000,
            "saved_bytes": 7_600_000 // (1 + place),
        }
    return line


def plant_more(folder: Path) -> Path:
    """Write into a planted study what only some studies have: monitors' events, further findings, tasks."""
    study = read_study(folder)
    for arm in study.arms:
        run = study.run_folder(study.cells_of(arm.name, "verdict")[0])
        (run / CURVE).unlink()
        run.rmdir()
        plant_run(run)
    between = {"difference": 0.0123, "low": -0.0017, "high": 0.0263, "verdict": "cannot tell"}
    further = {
        "noise_floor": between | {"run_spread": 0.0071},
        "batch_penalty": between | {"sentence": "cannot tell: 3 seeds"},
    }
    (folder / FURTHER).write_text(json.dumps(further))
    names = {"task": "gsm8k", "metric": "acc", "baseline": BASELINE, "seeds": 3, "questions": 321, "alpha": 0.05}
    numbers = {"band": 0.01, "spread": 0.002, "p": 0.0123, "p_corrected": None}
    verdicts = [
        {"arm": arm.name, **names, **between, **numbers, "sentence": f"cannot tell whether {arm.name} matches"}
        for arm in study.arms
        if arm.name != BASELINE
    ]
    score = {"task": "gsm8k", "metric": "acc", "questions": 321}
    scores = [{"arm": arm.name, "seed": seed, "score": 0.417, **score} for arm in study.arms for seed in (1, 2, 3)]
    settings = {"tasks": ["gsm8k"], "limit": 321, "num_fewshot": 5, "chat_template": False, "band": 0.01}
    found = {"lm_eval": "0.4.13", "settings": settings | {"allow_code_execution": False}, "baseline": BASELINE}
    (folder / "tasks").mkdir()
    (folder / "tasks" / "tasks.json").write_text(json.dumps(found | {"verdicts": verdicts, "scores": scores}))
    return folder
