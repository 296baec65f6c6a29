"""Losses and accuracies are summed in float64 at every precision, whatever type the model has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_lora.tasks.running_mean import RunningMean
from tests.support import toys
from tests.tasks.conftest import make
from tests.tasks.test_sequence_classifier import class_loader
from tests.tasks.test_sequence_classifier import make as make_classifier

pytestmark = toys.expected_warnings
every_precision = pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true", "bf16-mixed", "64-true"])


def rows(batch_size: int, count: int = 150) -> Any:
    return DataLoader(toys.token_rows(count), batch_size=batch_size)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@every_precision
def test_the_loss_of_an_evaluation_is_the_float64_mean_of_its_rows(
    llama_folder: Path, tmp_path: Path, precision: Any
) -> None:
    module = make(llama_folder)
    trainer = toys.trainer(tmp_path, precision=precision)
    (logged,) = trainer.validate(module, rows(2), verbose=False)
    assert trainer.callback_metrics["val_loss"].dtype is torch.float64
    predicted = trainer.predict(module, rows(2))
    assert predicted is not None
    losses = torch.cat([part["loss"].double() for part in predicted])  # pyright: ignore[reportArgumentType, reportCallIssue]
    tokens = torch.cat([part["tokens"] for part in predicted])  # pyright: ignore[reportArgumentType, reportCallIssue]
    expected = (losses * tokens).sum() / tokens.sum()
    assert logged["val_loss"] == pytest.approx(float(expected), rel=1e-6)
    assert logged["val_perplexity"] == pytest.approx(float(expected.exp()), rel=1e-6)
    # Accuracy is a ratio of two whole numbers.
    correct = logged["val_accuracy"] * int(tokens.sum())
    assert correct == pytest.approx(round(correct), abs=1e-6)


@every_precision
def test_the_training_loss_has_the_digits_of_float32(llama_folder: Path, tmp_path: Path, precision: Any) -> None:
    seen = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(trainer.callback_metrics["train_loss"])

    module = make(llama_folder)
    toys.trainer(tmp_path, precision=precision, callbacks=[Losses()]).fit(module, rows(2, 8))
    assert {loss.dtype for loss in seen} == {torch.float64 if precision == "64-true" else torch.float32}
    assert any(float(loss) != float(loss.bfloat16()) for loss in seen)


@pytest.mark.slow
@every_precision
def test_a_classifier_averages_its_rows_in_float64(llama_folder: Path, tmp_path: Path, precision: Any) -> None:
    module = make_classifier(llama_folder)
    trainer = toys.trainer(tmp_path, precision=precision)
    loader = class_loader(2, 150)
    (logged,) = trainer.validate(module, loader, verbose=False)
    assert module.model is not None
    with torch.no_grad():
        parts = [module.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits for batch in loader]
    logits, labels = torch.cat(parts), torch.cat([batch["labels"] for batch in loader])
    if precision != "bf16-mixed":  # outside of the Trainer there is no autocast
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        expected = torch.nn.functional.cross_entropy(wide, labels, reduction="none").double().mean()
        assert logged["val_loss"] == pytest.approx(float(expected), rel=1e-6)
        assert logged["val_accuracy"] == float((logits.argmax(-1) == labels).double().mean())
    assert logged["val_accuracy"] * 150 == pytest.approx(round(logged["val_accuracy"] * 150), abs=1e-9)


@pytest.mark.parametrize(
    "convert",
    [
        lambda mean: mean.to(torch.bfloat16),
        lambda mean: mean.half(),
        lambda mean: torch.nn.Sequential(mean).to("meta").to_empty(device="cpu")[0],
        lambda mean: torch.nn.Sequential(mean).to(dtype=torch.float16)[0],
        copy.deepcopy,
    ],
)
def test_no_conversion_of_a_module_lowers_its_means(convert: Any) -> None:
    mean = RunningMean()
    mean = convert(mean)
    for _ in range(3000):
        mean.update(torch.tensor([1.0, 1.25], dtype=torch.bfloat16), 2)
    assert mean.compute().dtype is torch.float64
    assert float(mean.compute()) == 1.125


def test_a_mean_begins_anew_when_reset() -> None:
    mean = RunningMean().to(torch.float16)
    mean.update(torch.ones(3), 3)
    mean.reset()
    mean.update(torch.tensor([2.0]), torch.tensor(1))
    assert (float(mean.compute()), mean.total.dtype) == (2.0, torch.float64)
