"""Folders of runs whose numbers are known, as ``fit`` writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.files.events import write_event
from lightning_lora.study.report.runs.losses import LossCurve

CONFIG = {
    "seed_everything": 7,
    "model": {
        "class_path": "lightning_lora.tasks.CausalLM",
        "init_args": {"model": "base", "learning_rate": 3e-4, "lora": {"rank": 8, "alpha": 32.0, "targets": "all"}},
    },
    "data": {"class_path": "lightning_lora.data.SFTDataModule", "init_args": {"train": "rows.jsonl"}},
}


def plant_run(folder: Path, steps: int = 60, name: str = "base", monitors: bool = True, how: str = "done") -> Path:
    """Write the folder of a run.

    Args:
        folder: The folder.
        steps: Optimizer steps.
        name: Name of its model.
        monitors: Whether batch and capacity were watched.
        how: How it ended; "" for a run without a word about its end.
    """
    folder.mkdir(parents=True)
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    config["model"]["init_args"]["model"] = name
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    curve = LossCurve()
    for step in range(1, steps + 1):
        curve.train[step] = 1.5 + 1.9 * math.exp(-step / 40) + 0.05 * math.sin(7 * step)
        curve.effort[step] = (400 * step, 0.5 * step)
        if step % 20 == 0:
            curve.validation[step] = 1.55 + 1.9 * math.exp(-step / 40)
    curve.write(folder / "curve.csv")
    write_event(
        folder,
        {"event": "started", "step": 0, "command": ["lightning-lora", "fit"], "device": "cpu", "steps_planned": 80},
    )
    for event in _monitored(steps) if monitors else []:
        write_event(folder, event)
    if how:
        write_event(folder, {"event": "ended", "step": steps, "how": how, "reason": "ValueError: <b>no</b>"})
    return folder


def _monitored(steps: int) -> list[Mapping[str, Any]]:
    batch = {"batch/k": 1, "batch/rows": 4, "batch/steps_total": float(steps)}
    events: list[Mapping[str, Any]] = [{"event": "batch", "step": 0, **batch}]
    for step in range(1, steps + 1):
        known = step > 5
        noise = {"gns/value": 80.0 + step, "gns/low": 60.0 if known else None, "gns/high": 120.0 if known else None}
        sample = {"rows_seen": 4 * step, "gns/n": step, "state": "noise-limited", **noise}
        events.append({"event": "noise_scale", "step": step, **batch, **sample})
    for step in (steps // 2, steps):
        losses = {
            "capacity/capture": 0.8,
            "capacity/capture_low": 0.7,
            "capacity/capture_high": 0.9,
            "capacity/loss": 1.6,
            "capacity/half_loss": 1.7,
            "capacity/bare_loss": 3.4,
            "capacity/truncation": 0.06,
        }
        events.append({"event": "capacity", "step": step, "verdict": "UNDETERMINED", **losses})
    group = {"rank": 8.0, "stable_rank": 2.0, "effective_rank": 4.0, "share": 0.1, "truncation": 0.06, "state": ""}
    groups = {f"layer {number} {role}": group for number in range(12) for role in ("attention", "mlp")}
    sentence = "capacity: UNDETERMINED: half of the rank loses 6.0% of what the adapters gained."
    events.append({"event": "capacity_verdict", "step": steps, "sentence": sentence, "groups": groups})
    planned = {"steps": steps, "tokens": 400 * steps, "seconds": 20.0}
    measured = {"steps": steps, "tokens": 400 * steps, "seconds": 30.0, "peak_bytes": 2**20}
    both = {"planned": planned, "measured": measured, "stopped": False, "memory_is": "allocated"}
    return [*events, {"event": "planned_and_measured", "step": steps, **both}]
