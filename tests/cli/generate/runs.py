"""Runs and models on disk that the tests of ``generate`` share, and how they call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_lora.cli import main as cli
from tests.support.commands import EMBEDDED, configs, lightning_lora

SHORT = ["--max_new_tokens=8", "--device=cpu"]


def fit(where: Path, method: str, *options: str) -> Path:
    """The folder of a short run on the embedded model, made by the command."""
    done = lightning_lora(
        "fit", *configs("sft.yaml", method), *EMBEDDED, "--data.init_args.max_rows=8", *options, cwd=where
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (config,) = where.rglob("config.yaml")
    return config.parent


def generated(source: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    """What ``generate`` writes for two questions."""
    prompts = ["--prompt", "What is 2 + 3?", "--prompt", "Hi"]
    assert cli.main(["generate", str(source), *prompts, *SHORT, f"--out={out}", *options]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]
