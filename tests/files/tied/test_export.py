"""``export`` of a run whose tied embeddings are adapted or trained: the adapter folder and the checkpoint agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lora import save_adapter
from lightning_lora.cli.embedded import MODEL
from lightning_lora.cli.export import export
from lightning_lora.tasks import CausalLM
from tests.files.tied.families import assert_equal, train

TOKENS = torch.arange(24).reshape(2, 12) + 5
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.filterwarnings("ignore:The `train_dataloader`", "ignore:.*does not have many workers")
@pytest.mark.parametrize(
    "lora",
    [
        {"targets": ["embed_tokens"], "tied_weights": "untie"},
        {"targets": ["q_proj"], "trainable": ["lm_head"], "tied_weights": "untie"},
    ],
    ids=["adapted table", "trained head"],
)
def test_the_exported_model_is_the_one_that_was_trained(lora: dict[str, Any], tmp_path: Path) -> None:
    # In float32, as a merge on disk keeps the type of the base.
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "base")
    task = CausalLM(str(tmp_path / "base"), lora={"rank": 4, **lora})
    task.configure_model()
    assert task.model_config.tie_word_embeddings, "the task's own config is left alone"
    train(task.model)
    trained = logits(task.model)
    save_adapter(task, tmp_path / "adapter")
    trainer = Trainer(accelerator="cpu", **QUIET)
    trainer.strategy.connect(task)
    task.trainer = trainer
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    for number, source in enumerate(("adapter", "run.ckpt")):
        export(tmp_path / source, tmp_path / str(number), "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert_equal(logits(merged), trained)
        assert merged.config.tie_word_embeddings is False
        assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    export(tmp_path / "run.ckpt", tmp_path / "peft", "peft")
    export(tmp_path / "peft", tmp_path / "from peft", "merged")
    assert_equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "from peft")), trained)
