"""Supervised fine-tuning of a causal language model: the loss, and what may change in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_lora import LoRAConfig, lora_layers
from lightning_lora.callbacks import LoRAGuard
from tests.support import toys
from tests.tasks.conftest import Record, fit, make, token_loader

pytestmark = toys.expected_warnings


def test_loss_is_transformers_own(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder)
    batch = next(iter(token_loader(8)))
    runner = toys.trainer(tmp_path)
    (measured,) = runner.validate(module, token_loader(8), verbose=False)
    reference = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    with torch.no_grad():
        loss = reference(**batch).loss
    assert measured["val_loss"] == pytest.approx(float(loss), rel=1e-6)
    assert measured["val_perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)


def test_loss_does_not_depend_on_how_rows_are_batched(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder)
    losses = [
        toys.trainer(tmp_path).test(module, token_loader(size), verbose=False)[0]["test_loss"] for size in (1, 3, 8)
    ]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_training_moves_every_adapter_and_not_one_bit_of_the_base(llama_folder: Path, tmp_path: Path) -> None:
    module, record = make(llama_folder), Record()
    runner = fit(
        module,
        tmp_path,
        max_epochs=2,
        callbacks=[record, LoRAGuard()],
        validation=token_loader(),
        num_sanity_val_steps=1,
    )
    assert len(lora_layers(module)) == 14
    assert all(toys.moved(module))
    assert toys.same(record.base, toys.base_of(module))
    assert runner.callback_metrics.keys() >= {"train_loss", "val_loss", "val_perplexity", "val_accuracy"}


def test_training_lowers_the_loss(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, learning_rate=1e-3, lora=LoRAConfig(rank=8))
    before = toys.trainer(tmp_path).validate(module, token_loader(), verbose=False)[0]["val_loss"]
    fit(module, tmp_path, max_epochs=10)
    after = toys.trainer(tmp_path).validate(module, token_loader(), verbose=False)[0]["val_loss"]
    assert after < before - 0.03


def test_accumulated_steps_train_as_one_big_batch(llama_folder: Path, tmp_path: Path) -> None:
    states = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        module = make(llama_folder, learning_rate=1e-4)
        runner = toys.trainer(tmp_path, accumulate_grad_batches=accumulate, max_epochs=3, gradient_clip_val=1.0)
        runner.fit(module, token_loader(batch_size))
        states.append(toys.snapshot(module))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_row_without_supervised_tokens_gives_no_nan(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder)
    data = toys.token_rows(4)
    for row in data[:2]:
        row["labels"].fill_(-100)
    rows: Any = DataLoader(data, batch_size=1)  # pyright: ignore[reportArgumentType]
    toys.trainer(tmp_path, accumulate_grad_batches=2).fit(module, rows, rows)
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    predicted = toys.trainer(tmp_path).predict(module, rows)
    assert predicted is not None
    assert [float(part["loss"]) for part in predicted[:2]] == [0.0, 0.0]  # pyright: ignore


def test_prediction_gives_each_rows_loss_and_tokens(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder)
    (predicted,) = toys.trainer(tmp_path).predict(module, token_loader(8)) or []
    labels = next(iter(token_loader(8)))["labels"][:, 1:]
    assert predicted["tokens"].tolist() == (labels != -100).sum(-1).tolist()  # pyright: ignore
    (measured,) = toys.trainer(tmp_path).test(module, token_loader(8), verbose=False)
    mean = (predicted["loss"] * predicted["tokens"]).sum() / predicted["tokens"].sum()  # pyright: ignore
    assert measured["test_loss"] == pytest.approx(float(mean), rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        (None, "32-true", torch.float32),
        (None, "bf16-true", torch.bfloat16),
        ("bfloat16", "bf16-mixed", torch.bfloat16),
        ("bfloat16", "32-true", torch.bfloat16),
    ],
)
def test_base_type_and_wide_adapters(
    dtype: str | None, precision: Any, expected: torch.dtype, llama_folder: Path, tmp_path: Path
) -> None:
    module, record = make(llama_folder, dtype=dtype), Record()
    fit(module, tmp_path, precision=precision, callbacks=[record, LoRAGuard()])
    for layer in lora_layers(module).values():
        assert (layer.weight.dtype, layer.lora_A.dtype, layer.lora_B.dtype) == (expected, torch.float32, torch.float32)
    assert toys.same(record.base, toys.base_of(module))


def test_vocabulary_and_tokenizer_come_from_the_model(llama_folder: Path) -> None:
    module = make(llama_folder)
    assert module.vocab_size == len(module.tokenizer)
