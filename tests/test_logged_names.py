"""The page of logged names has every name that tasks and monitors log, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from docs.blocks import ROOT
from lightning_lora import LoRAConfig
from lightning_lora.batch.history import _OTHER_METRICS
from lightning_lora.capacity.reading import LOGGED
from lightning_lora.cli.embedded import MODEL
from lightning_lora.data import PreferenceDataModule, PromptDataModule, SFTDataModule
from lightning_lora.tasks import DPO, CausalLM, PolicyGradient, RewardModel, SequenceClassifier

PAGE = (ROOT / "docs" / "reference" / "logged_names.md").read_text()
CONFIG = LoRAConfig(rank=1)
FIRST_CELLS = re.findall(r"^\| (`.*?`) \|", PAGE.partition("## The progress bar")[0], flags=re.MULTILINE)
NAMES = {name for cell in FIRST_CELLS for name in re.findall(r"`([^`]+)`", cell)}


def test_every_name_of_a_monitor_is_on_the_page() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "lightning_lora").rglob("*.py"))
    written = set(re.findall(r"\"((?:gns|batch|rank)/\w+)\"[:\]]", source))
    written |= {f"gns/{metric}{end}" for metric in _OTHER_METRICS for end in ("", "_conclusive")}
    written |= {f"capacity/{name}" for name in LOGGED}
    assert {name for name in NAMES if "/" in name} == written


def rows(folder: Path, name: str, *, prompt: str = "Say hello.", **columns: str) -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps({"prompt": f"{prompt} {number}"} | columns) for number in range(4)))
    return str(path)


def classes() -> Iterator[dict[str, Any]]:
    for label in range(4):
        yield {"input_ids": torch.arange(5, 9), "attention_mask": torch.ones(4).long(), "labels": torch.tensor(label)}


def runs(folder: Path) -> Iterator[tuple[LightningModule, dict[str, Any]]]:
    """Each task with data for a step and a validation."""
    model = str(MODEL)
    settings: dict[str, Any] = {"learning_rate": 1e-4, "lora": CONFIG}
    some: dict[str, Any] = {"batch_size": 4}
    answered = rows(folder, "answered.jsonl", completion="Hello.")
    pairs = rows(folder, "pairs.jsonl", chosen="Hello.", rejected="No.")
    asked = rows(folder, "asked.jsonl")
    labelled: Any = list(classes())
    loader = DataLoader(labelled, batch_size=4)
    yield CausalLM(model, **settings), {"datamodule": SFTDataModule(answered, answered, **some)}
    yield (
        SequenceClassifier(model, num_labels=4, **settings),
        {"train_dataloaders": loader, "val_dataloaders": loader},
    )
    for task in (DPO, RewardModel):
        yield task(model, **settings), {"datamodule": PreferenceDataModule(pairs, pairs, **some)}
    policy = PolicyGradient(
        model,
        **settings,
        dtype="float32",
        reward=lambda prompts, completions, **columns: [len(completion) % 3 for completion in completions],
        reward_workers=0,
        loss="clip",
        advantage="gae",
        kl="k2",
        kl_coefficient=0.1,
        group_size=2,
        max_new_tokens=3,
    )
    yield policy, {"datamodule": PromptDataModule(asked, asked, **some)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_name_of_a_task_is_on_the_page(tmp_path: Path) -> None:
    logged: set[str] = set()
    for task, data in runs(tmp_path):
        trainer = Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
        )
        trainer.fit(task, **data)
        logged |= trainer.logged_metrics.keys() | trainer.callback_metrics.keys()
    shown = {name for name in NAMES if "/" not in name}
    assert {name.removesuffix("_step").removesuffix("_epoch") for name in logged} == shown
