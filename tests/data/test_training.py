from __future__ import annotations

import pickle
from pathlib import Path

import jsonargparse
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from tests.data.conftest import QUIET, Write

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '\\w+' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    # Python 3.12; the workers only read tokens.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]

ROWS = [{"question": "What is " + "two " * n, "answer": "the sum"} for n in range(1, 9)]


class Bigram(LightningModule):
    """The smallest model that trains on these batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.logits = nn.Embedding(self.vocab_size, self.vocab_size)
        self.losses: list[float] = []
        self.batches: list[dict[str, Tensor]] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.batches.append(batch)
        logits, labels = self.logits(batch["input_ids"][:, :-1]), batch["labels"][:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.batches.append(batch)

    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.batches.append(batch)

    def predict_step(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["input_ids"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_trainer_trains_on_it(
    write: Write, tokenizer: PreTrainedTokenizerFast, num_workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write("a.jsonl", ROWS)
    data = SFTDataModule(path, path, path, batch_size=4, num_workers=num_workers)
    model = Bigram(tokenizer)
    trainer = Trainer(**QUIET, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(model, datamodule=data)
    assert model.losses[-1] < model.losses[0]
    assert trainer.global_step == 4
    assert len(model.batches) == 8
    trainer.validate(model, datamodule=data, verbose=False)
    trainer.test(model, datamodule=data, verbose=False)
    assert len(model.batches) == 12
    predictions = trainer.predict(model, datamodule=data)
    assert predictions is not None
    assert len(predictions) == 2
    assert "forked" not in capfd.readouterr().err
    assert set(data.statistics) == {"train", "validation", "test"}


def test_each_epoch_of_a_trainer_has_its_own_order(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    model = Bigram(tokenizer)
    trainer = Trainer(**QUIET, max_epochs=2, limit_val_batches=0)
    path = write("a.jsonl", ROWS)
    trainer.fit(model, datamodule=SFTDataModule(path, path, batch_size=1))
    lengths = [batch["input_ids"].shape[1] for batch in model.batches]
    assert sorted(lengths[:8]) == sorted(lengths[8:])
    assert lengths[:8] != lengths[8:]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_training_goes_without_validation_rows(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    model = Bigram(tokenizer)
    Trainer(**QUIET, max_steps=2).fit(model, datamodule=SFTDataModule(write("a.jsonl", ROWS), batch_size=4))
    assert len(model.batches) == 2


def test_a_module_travels_to_other_processes(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    data = SFTDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer)
    data.setup()
    travelled = pickle.loads(pickle.dumps(data))
    for ours, theirs in zip(data.train_dataloader(), travelled.train_dataloader(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "facts")
        assert torch.equal(ours["facts"].places, theirs["facts"].places)


def test_options_come_from_yaml(write: Write, tmp_path: Path) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SFTDataModule, "data")
    config = write("c.yaml", "data:\n  train: [a.jsonl, b.jsonl]\n  validation: openai/gsm8k:test\n  max_rows: 100\n")
    parser.add_argument("--config", action="config")
    parsed = parser.parse_args(["--config", config, "--data.tokenizer", str(tmp_path), "--data.seed", "7"])
    data = parser.instantiate(parsed).data
    assert data.sources == {"train": ["a.jsonl", "b.jsonl"], "validation": "openai/gsm8k:test", "test": None}
    assert (data.tokenizer, data.seed, data.limits["train"]) == (str(tmp_path), 7, 100)
    assert parser.parse_args([]).data.train is None
    help_text = " ".join(parser.format_help().split())
    assert "Tokens kept of each row, from its beginning." in help_text
