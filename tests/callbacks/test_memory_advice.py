"""An out-of-memory error names the settings to lower; the errors come from the real allocator."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import torch
from torch import Tensor

from lightning_lora import LoRAConfig
from lightning_lora.callbacks import MemoryAdvice
from lightning_lora.data import SFTDataModule
from lightning_lora.memory import run_step
from lightning_lora.tasks import CausalLM
from tests.support import tiny_models, toys
from tests.support.toys import Toy

pytestmark = toys.expected_warnings


def allocate_too_much() -> Tensor:
    return torch.empty(2**50, dtype=torch.uint8)  # a PiB


class Large(CausalLM):
    """Needs too much memory for a batch of more than one row."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if len(batch["input_ids"]) > 1:
            allocate_too_much()
        return super().training_step(batch, batch_idx)


@pytest.fixture(autouse=True)
def untold_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is traced where nobody tells how much memory there is."""
    monkeypatch.setattr(run_step, "room_for_step", lambda device, held: None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def message(folder: Path, llama: Path, batch_size: int = 4, lora: Any = None, **options: Any) -> str | None:
    """The message of the error that ended the run; None if it succeeded."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"question": "what", "answer": "that"}\n' * 4)
    data = SFTDataModule(str(rows), batch_size=batch_size, max_length=40)
    trainer = toys.trainer(folder, callbacks=[MemoryAdvice()], **options)
    try:
        trainer.fit(Large(str(llama), lora=lora), datamodule=data)
    except RuntimeError as error:
        return str(error)
    return None


def test_three_settings_of_the_run_are_named_and_the_cause_is_kept(llama_folder: Path, tmp_path: Path) -> None:
    text = message(tmp_path, llama_folder, lora=LoRAConfig(rank=2), accumulate_grad_batches=2)
    assert text is not None
    cause, _, advice = text.partition("\n\n")
    assert "can't allocate memory: you tried to allocate 1125899906842624 bytes" in cause
    assert advice.splitlines() == [
        "Out of memory in optimizer step 1. Lower, in this order:",
        "  1. batch_size: 4 -> 2; with trainer.accumulate_grad_batches 2 -> 4 the optimizer step stays as large",
        "  2. max_length: 40 -> 20 tokens; activations shrink with it, long rows are cut",
        "  3. trainer.precision: 32-true -> bf16-true; half of weights and activations",
    ]


def test_full_fine_tuning_is_told_of_lora(llama_folder: Path, tmp_path: Path) -> None:
    assert "  3. lora: full fine-tuning -> LoRA; " in str(message(tmp_path, llama_folder))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_what_is_low_already_is_not_named(precision: str, llama_folder: Path, tmp_path: Path) -> None:
    text = str(message(tmp_path, llama_folder, lora=LoRAConfig(rank=2), precision=precision))
    assert "precision" not in text
    assert "  3. activation_checkpointing: false -> true; activations are computed twice" in text


def test_a_smaller_run_works_in_the_same_process(llama_folder: Path, tmp_path: Path) -> None:
    assert message(tmp_path, llama_folder) is not None
    assert message(tmp_path, llama_folder, batch_size=1) is None


def test_a_module_and_a_loader_of_ones_own_are_advised_too(tmp_path: Path) -> None:
    class Own(Toy):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 2:
                allocate_too_much()
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=r"Out of memory in optimizer step 3.*\n  1. batch_size: 2 -> 1; "):
        toys.trainer(tmp_path, callbacks=[MemoryAdvice()]).fit(Own(), toys.loader())


def test_a_model_of_transformers_in_a_module_of_ones_own_is_told_of_the_method_it_has(tmp_path: Path) -> None:
    class Own(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.llama = tiny_models.llama().train()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            allocate_too_much()
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="Out of memory") as caught:
        toys.trainer(tmp_path, callbacks=[MemoryAdvice()]).fit(Own(), toys.loader())
    (name,) = re.findall(r"activation checkpointing: off -> (\w+)\(\) on the model", str(caught.value))
    model = tiny_models.llama()
    getattr(model, name)()  # an older name would warn
    assert model.model.layers[0].gradient_checkpointing


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    class Failing(Toy):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        toys.trainer(tmp_path, callbacks=[MemoryAdvice()]).fit(Failing(), toys.loader())
