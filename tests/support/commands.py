"""The command line from outside: running it, its shipped configs, and what it leaves in a folder."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import torch

from lightning_lora.cli.embedded import MODEL, TRAIN, VALIDATION
from tests.support import toys, warm

CONFIGS = toys.ROOT / "cli_configs"
EMBEDDED = [
    f"--model.init_args.model={MODEL}",
    f"--data.init_args.train={TRAIN}",
    f"--data.init_args.validation={VALIDATION}",
    "--data.init_args.max_rows=12",
    "--data.init_args.validation_rows=4",
    "--data.init_args.batch_size=4",
    "--data.init_args.max_length=128",
    "--trainer.accelerator=cpu",
]
"""Options for a short run on the embedded model and data."""
COMMAND = ("-W", "ignore", "-m", "lightning_lora")


def lightning_lora(*arguments: str, cwd: Path, ranks: int = 1) -> warm.Done:
    """Run ``lightning-lora *arguments`` in one process, or as ranks that end alike; returns what the first has done."""
    done = warm.run_ranks(ranks, *COMMAND, *arguments, cwd=cwd, check=False)
    assert len({rank.returncode for rank in done}) == 1, [rank.stderr for rank in done]
    return done[0]


def configs(*names: str) -> list[str]:
    return [f"--config={CONFIGS / name}" for name in names]


def unlisted_files(folder: Path) -> set[str]:
    """Files below the folder of a run or a study that ``docs/reference/run_files.md`` does not name."""
    page = (toys.ROOT / "docs" / "reference" / "run_files.md").read_text()
    cells = re.findall(r"^\| (`.*?`) \|", page, flags=re.MULTILINE)
    patterns = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)} - {"runs/*"}
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    # The runs of a study have folders of their own.
    of_run = {name: re.sub(r"^runs/[^/]+/", "", name) for name in found}
    return {name for name in found if not any(fnmatch(of_run[name], pattern) for pattern in patterns)}


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within 1e-5 of the largest logit: float32 itself is no closer to float64 over five layers."""
    assert float(((found - expected).abs().max() / expected.abs().max()).detach()) <= 1e-5
