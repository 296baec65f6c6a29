from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from tests.data.conftest import Write

ROWS = [{"text": f"{n:03d}"} for n in range(50)]


def order(data: SFTDataModule, epoch: int) -> list[str]:
    loader = data.train_dataloader()
    sampler: Any = loader.sampler
    sampler.set_epoch(epoch)
    tokenizer: Any = data.tokenizer
    return [text[:3] for batch in loader for text in tokenizer.batch_decode(batch["input_ids"])]


@pytest.fixture
def path(write: Write) -> str:
    return write("a.jsonl", ROWS)


def ready(path: str, tokenizer: PreTrainedTokenizerFast, **options: int) -> SFTDataModule:
    data = SFTDataModule(path, tokenizer=tokenizer, **options)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def test_the_same_seed_gives_the_same_order(path: str, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(1)
    first = order(ready(path, tokenizer, seed=3), epoch=0)
    torch.manual_seed(2)
    second = ready(path, tokenizer, seed=3, batch_size=5)
    torch.rand(7)
    assert order(second, epoch=0) == first
    assert sorted(first) == sorted(row["text"] for row in ROWS)
    assert first != sorted(first)


def test_seeds_and_epochs_have_orders_of_their_own(path: str, tokenizer: PreTrainedTokenizerFast) -> None:
    orders = [
        tuple(order(ready(path, tokenizer, seed=seed), epoch)) for seed in (0, 1, 2**32, 2**70) for epoch in range(3)
    ]
    assert len(set(orders)) == 12


def test_reading_the_data_draws_nothing_from_the_global_generator(
    path: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    order(ready(path, tokenizer), epoch=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_validation_and_test_keep_the_order_of_the_file(
    path: str, tokenizer: PreTrainedTokenizerFast, split: str
) -> None:
    data = SFTDataModule(None, path, path, tokenizer=tokenizer)
    data.setup("validate" if split == "validation" else "predict")
    loader = data.val_dataloader() if split == "validation" else data.predict_dataloader()
    texts = [text[:3] for batch in loader for text in tokenizer.batch_decode(batch["input_ids"])]
    assert texts == [row["text"] for row in ROWS]


SCRIPT = """
import os, sys, warnings
warnings.simplefilter("ignore")
import datasets.config
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
from lightning.pytorch import LightningModule, Trainer
import torch
from lightning_lora.data import SFTDataModule
from tests.support.tiny_tokenizer import tiny_tokenizer

class Reader(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        self.tokenizer, self.seen = tiny_tokenizer(), []
    def training_step(self, batch):
        self.seen += [text[:3] for text in self.tokenizer.batch_decode(batch["input_ids"])]
        return self.layer.weight.sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)
    def on_train_end(self):
        with open(os.path.join(sys.argv[2], f"rank{self.global_rank}"), "w") as stream:
            stream.write(" ".join(self.seen))

devices = int(sys.argv[3])
Trainer(accelerator="cpu", strategy="ddp" if devices > 1 else "auto", devices=devices, max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
).fit(Reader(), datamodule=SFTDataModule(sys.argv[1], batch_size=10 // devices, seed=5))
"""


@pytest.mark.slow
def test_two_processes_share_the_order_of_one(path: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    seen: dict[int, list[list[str]]] = {}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        subprocess.run(
            [sys.executable, tmp_path / "run.py", path, folder, str(devices)],
            check=True,
            timeout=300,
            capture_output=True,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"},
        )
        seen[devices] = [(folder / f"rank{rank}").read_text().split() for rank in range(devices)]
    together = [text for pair in zip(*seen[2], strict=True) for text in pair]
    assert together == seen[1][0]
    data = ready(path, tokenizer, seed=5)
    assert together == order(data, epoch=0) + order(data, epoch=1)
