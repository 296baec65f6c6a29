"""The shipped config for a base in 4 bits, through the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_lora.cli.embedded import MODEL, TRAIN, VALIDATION
from tests.support.commands import configs, lightning_lora
from tests.support.quantised_models import difference
from tests.support.toys import tree


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_qlora_trains_twenty_steps_on_the_cpu_and_exports_a_plain_model(quantization: str, tmp_path: Path) -> None:
    base = tree(MODEL)
    done = lightning_lora(
        "fit",
        *configs("sft.yaml", "qlora.yaml"),
        f"--model.init_args.model={MODEL}",
        f"--model.init_args.quantization={quantization}",
        f"--data.init_args.train={TRAIN}",
        f"--data.init_args.validation={VALIDATION}",
        "--data.init_args.validation_rows=16",
        "--data.init_args.batch_size=4",
        "--data.init_args.max_length=128",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=20",
        "--trainer.val_check_interval=10",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "35 layers adapted" in done.stdout + done.stderr
    (run,) = (tmp_path / "runs" / "sft").iterdir()
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    checks = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert checks[-1] < checks[0]
    assert tree(MODEL) == base

    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all("lora_" in name for name in state)
    done = lightning_lora("export", str(run), "merged", "--format", "merged", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=merged.dtype)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert difference(merged(tokens).logits, plain(tokens).logits) > 0.05
