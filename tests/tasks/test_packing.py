"""Packed examples train exactly what padded examples do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_lora import LoRAConfig
from lightning_lora.data import SFTDataModule
from lightning_lora.errors import DataError
from lightning_lora.tasks import CausalLM
from tests.support import tiny_models, toys
from tests.support.packed import (
    LAYOUTS,
    MODELS,
    Recorded,
    assert_same_training,
    examples,
    one_row,
    ready,
    save,
    trained,
)
from tests.tasks.conftest import StopAfterEpoch

pytestmark = [
    *toys.expected_warnings,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class WithLogits(Recorded):
    """Never computes the loss in the place of the head."""

    _head_is_last = False


Padded = Callable[[str], tuple[Path, Recorded]]


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Padded:
    """The folder of one of the `MODELS`, and its run on padded rows."""

    @cache
    def run(name: str) -> tuple[Path, Recorded]:
        build, attention = MODELS[name]
        folder = save(build(), tmp_path_factory.mktemp("models") / "model", attention)
        return folder, trained(folder, folder.parent, LAYOUTS["padded"](examples()))

    return run


@pytest.mark.parametrize("layout", ["even rows", "packs"])
@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients_are_those_of_padded_rows(padded: Padded, model: str, layout: str, tmp_path: Path) -> None:
    folder, expected = padded(model)
    found = trained(folder, tmp_path, LAYOUTS[layout](examples()))
    assert found.model is not None
    assert found.model.config._attn_implementation == MODELS[model][1]
    assert found._head_is_last
    assert_same_training(found, expected)


@pytest.mark.parametrize("layout", ["even rows", "packs"])
def test_loss_and_gradients_are_the_same_from_logits(layout: str, tmp_path: Path) -> None:
    folder = save(tiny_models.llama(), tmp_path / "model")
    expected = trained(folder, tmp_path, LAYOUTS["padded"](examples()), WithLogits)
    assert_same_training(trained(folder, tmp_path, LAYOUTS[layout](examples()), WithLogits), expected)


def test_even_rows_train_the_same_adapters(tmp_path: Path) -> None:
    folder = save(tiny_models.llama(), tmp_path / "model")
    padded, packed = (
        trained(folder, tmp_path, LAYOUTS[layout](examples()), max_epochs=4, accumulate_grad_batches=1)
        for layout in ("padded", "even rows")
    )
    # AdamW makes steps of a size of their own, 1e-3 here, out of the rounding of gradients near zero.
    torch.testing.assert_close(packed.state_dict(), padded.state_dict(), rtol=0, atol=2e-5)
    assert packed.losses == pytest.approx(padded.losses, rel=1e-5)
    assert len(packed.gradients) == 8


def packed_logits(module: CausalLM, rows: list[dict[str, Any]]) -> list[Tensor]:
    """Of each example of one row."""
    batch = one_row(rows)
    with torch.no_grad():
        logits = module(batch["input_ids"], position_ids=batch["position_ids"])[0]
    return list(logits.split([len(row["input_ids"]) for row in rows]))


@pytest.mark.parametrize("model", MODELS)
def test_no_example_changes_the_logits_of_another(padded: Padded, model: str) -> None:
    module = CausalLM(str(padded(model)[0]), lora=LoRAConfig(rank=4))
    module.configure_model()
    tiny_models.wake(module, size=0.2)
    module.eval()
    rows = examples()
    before = packed_logits(module, rows)
    for changed in (0, 2, len(rows) - 1):
        others = [examples(seed=1)[i] if i == changed else row for i, row in enumerate(rows)]
        after = packed_logits(module, others)
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            moved = (one - other).abs().max()
            assert moved > 1e-3 if index == changed else moved <= 1e-6, (changed, index)


def test_examples_see_each_other_without_positions(padded: Padded, tmp_path: Path) -> None:
    """The tests above can fail: this is what they would see."""
    folder, expected = padded("llama, sdpa")
    loader = LAYOUTS["even rows"](examples())
    batches = [{"input_ids": b["input_ids"], "labels": b["labels"], "attention_mask": None} for b in loader]
    broken = trained(folder, tmp_path, ready(batches))
    with pytest.raises(AssertionError):
        assert_same_training(broken, expected)


def test_the_first_token_of_an_example_is_never_predicted_from_another(tmp_path: Path) -> None:
    folder = save(tiny_models.llama(), tmp_path / "model")
    clean = one_row(examples())
    # What other collators make: every token is its own label, the first of an example too.
    labelled = clean | {"labels": torch.where(clean["position_ids"] == 0, clean["input_ids"], clean["labels"])}
    assert not torch.equal(labelled["labels"], clean["labels"])
    one, other = (trained(folder, tmp_path, ready([batch]), accumulate_grad_batches=1) for batch in (clean, labelled))
    assert one.losses == other.losses
    torch.testing.assert_close(one.gradients, other.gradients, rtol=0, atol=0)


def test_a_batch_with_mask_and_positions_is_refused(tmp_path: Path) -> None:
    folder = save(tiny_models.llama(), tmp_path / "model")
    batch = one_row(examples())
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(DataError, match=r"attention_mask .padded rows. or position_ids .packed rows., not both"):
        trained(folder, tmp_path, ready([batch]), accumulate_grad_batches=1)


TEXTS = "".join(f'{{"question": "{"what " * (1 + n % 5)}", "answer": "{n}"}}\n' for n in range(22))


@pytest.fixture
def sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SFTDataModule]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    (tmp_path / "a.jsonl").write_text(TEXTS)
    return lambda **options: SFTDataModule(str(tmp_path / "a.jsonl"), max_length=60, **options)


def test_a_data_module_packs_as_it_pads(sft: Callable[..., SFTDataModule], llama_folder: Path, tmp_path: Path) -> None:
    states = []
    for packing in (False, "batch"):
        torch.manual_seed(0)
        module = CausalLM(str(llama_folder), 1e-3, lora=LoRAConfig(rank=2))
        toys.trainer(tmp_path, max_epochs=2).fit(module, datamodule=sft(packing=packing, batch_size=4))
        states.append(toys.snapshot(module))
    # Twelve steps of up to 1e-2 each.
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-4)


def test_resuming_on_packs_equals_the_uninterrupted_run(
    sft: Callable[..., SFTDataModule], llama_folder: Path, tmp_path: Path
) -> None:
    def run(callbacks: list[Callback], ckpt_path: Path | None = None) -> tuple[CausalLM, Trainer]:
        torch.manual_seed(0)
        module = CausalLM(str(llama_folder), 1e-3, lora=LoRAConfig(rank=2))
        runner = toys.trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=callbacks)
        data = sft(packing=True, batch_size=2)
        runner.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return module, runner

    whole, _ = run([])
    _, half = run([StopAfterEpoch()])
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run([], tmp_path / "half.ckpt")
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))
