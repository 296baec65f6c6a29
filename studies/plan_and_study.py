"""What `plan` says of the adapters of facts_over_capacity.yaml before anything is trained, with and without measuring.

    PYTHONPATH=. python studies/plan_and_study.py

The study itself is studies/facts_over_capacity.yaml. Larger: another study file whose arms differ in rank or targets.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lora.study.matched.spec import read_spec
from studies.modules.pages import FINDINGS, made_with, markdown_table, write_lines

STUDY = Path("studies", "facts_over_capacity.yaml")
OUT = FINDINGS / "plan_and_study"


def capacity(overrides: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """The row of a plan's capacity table for the adapters of an arm."""
    options = [part for name, value in overrides.items() for part in (f"--{name}", json.dumps(value))]
    with tempfile.TemporaryDirectory() as top:
        written = Path(top, "plan.json")
        command = [
            *(sys.executable, "-m", "lightning_lora", "--allow", "studies", "plan"),
            "--config",
            "studies/tiny.yaml",
        ]
        settings = ["--no-calibrate", "--json", str(written)]
        subprocess.run([*command, *options, *settings, *more], check=True, capture_output=True)
        rows = json.loads(written.read_text(encoding="utf-8"))["capacity"]
    rank = overrides["model.init_args.lora"]["rank"]
    return next(row for row in rows if row["rank"] == rank)  # the config's own targets come first


def lines() -> list[dict[str, object]]:
    """A line for each arm with adapters."""
    spec, _, common = read_spec(STUDY)
    found = []
    for arm in spec.arms:
        if "model.init_args.lora" not in arm.overrides:
            continue
        of_run = {name: value for name, value in common.items() if name.startswith(("data.", "model."))}
        overrides = {**of_run, **arm.overrides}
        assumed, measured = capacity(overrides), capacity(overrides, "--measure")
        found.append(
            {
                "arm": arm.name,
                "parameters": assumed["parameters"],
                "tokens a parameter (A)": assumed["ratio_a"],
                "B, 1 bit a token assumed": assumed["ratio_b"],
                "plan": assumed["verdict"],
                "B, bits of the base measured": measured["ratio_b"],
                "plan --measure": measured["verdict"],
            }
        )
    return found


def main() -> None:
    """Plan for all arms, and write the table."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    started = time.perf_counter()
    found = lines()
    write_lines(OUT / "results.csv", found)
    print(markdown_table(list(found[0]), [list(line.values()) for line in found]))
    print(made_with(time.perf_counter() - started))


if __name__ == "__main__":
    main()
