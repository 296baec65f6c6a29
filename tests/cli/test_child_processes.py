"""A command whose training happens in child processes writes what another does, and unlocks its run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import toys
from tests.support.commands import configs, lightning_lora

pytestmark = [pytest.mark.slow]


def test_the_adapter_is_written_and_the_folder_unlocked(tmp_path: Path) -> None:
    toys.save_llama(tmp_path / "llama")
    rows = [{"question": "what " * (1 + n % 5), "answer": "so " * (1 + n % 3)} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = lightning_lora(
        "fit",
        *configs("sft.yaml", "lora.yaml"),
        f"--model.init_args.model={tmp_path / 'llama'}",
        "--model.init_args.lora.rank=2",
        f"--data.init_args.train={tmp_path / 'rows.jsonl'}",
        f"--data.init_args.validation={tmp_path / 'rows.jsonl'}",
        "--data.init_args.batch_size=4",
        "--data.init_args.max_length=28",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.strategy=ddp_fork",
        "--trainer.max_steps=2",
        "--trainer.logger.init_args.name=forked",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.rglob("adapters/last/adapter_model.safetensors"))
    assert not list(tmp_path.rglob("*.lock"))
