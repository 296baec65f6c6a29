"""A run of the command line goes on exactly, and on no other base unless it is told to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import toys
from tests.support.commands import configs, lightning_lora
from tests.support.resuming import differences

pytestmark = [pytest.mark.slow]

ROWS = [{"question": "what " * (1 + n % 5), "answer": "so " * (1 + n % 3)} for n in range(22)]
PLACE = "step=3"
"""In the middle of the second of two epochs of 6 batches, with windows of 3."""


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli-resume")
    toys.save_llama(folder / "llama", attention_dropout=0.1)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


def fit(where: Path, name: str, *more: str) -> Any:
    """The finished command; its files are in ``where / name``."""
    return lightning_lora(
        "fit",
        *configs("sft.yaml", "lora.yaml", "packing.yaml"),
        f"--model.init_args.model={where / 'llama'}",
        "--model.init_args.lora.dropout=0.1",
        "--model.init_args.schedule=cosine",
        "--model.init_args.lora.rank=2",
        f"--data.init_args.train={where / 'rows.jsonl'}",
        f"--data.init_args.validation={where / 'rows.jsonl'}",
        "--data.init_args.validation_rows=4",
        "--data.init_args.batch_size=4",
        "--data.init_args.max_length=28",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--trainer.accumulate_grad_batches=3",
        "--trainer.val_check_interval=2",
        f"--trainer.logger.init_args.name={name}",
        "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.dirpath={where / name}",
        "--trainer.callbacks.filename={step}",
        "--trainer.callbacks.every_n_train_steps=1",
        "--trainer.callbacks.save_top_k=-1",
        *more,
        cwd=where,
    )


@pytest.fixture(scope="module")
def whole(where: Path) -> Path:
    done = fit(where, "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    return where / "whole"


def content(path: Path) -> dict[str, Any]:
    """A checkpoint without what it says of the folder it is in."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"] = {
        name: state for name, state in checkpoint["callbacks"].items() if not name.startswith("ModelCheckpoint")
    }
    return checkpoint


def test_the_command_line_goes_on_exactly(where: Path, whole: Path) -> None:
    resumed = fit(where, "resumed", f"--ckpt_path={whole / PLACE}.ckpt")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "not exactly" not in resumed.stdout + resumed.stderr
    found = differences(content(whole / "step=4.ckpt"), content(where / "resumed" / "step=4.ckpt"))
    assert not found, found[:5]


def test_another_base_is_refused_and_may_be_allowed(where: Path, whole: Path) -> None:
    path = where / "llama" / "model.safetensors"
    own = load_file(path)
    save_file({name: tensor * 1.5 for name, tensor in own.items()}, path, {"format": "pt"})
    try:
        refused = fit(where, "refused", f"--ckpt_path={whole / PLACE}.ckpt")
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert "trained on a base with fingerprint" in refused.stderr
        assert "--allow_other_base true" in refused.stderr
        allowed = fit(where, "allowed", f"--ckpt_path={whole / PLACE}.ckpt", "--allow_other_base=true")
        assert allowed.returncode == 0, allowed.stdout + allowed.stderr
    finally:
        save_file(own, path, {"format": "pt"})
