"""A probe does not change the run of a language model, and scores rows independently of their padding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import BatchProbe, LoRAConfig
from lightning_lora.callbacks import LoRAGuard
from lightning_lora.cli.demo_arm import MODEL, TRAIN, VALIDATION
from lightning_lora.data import SFTDataModule
from lightning_lora.tasks import CausalLM
from tests.support import toys

pytestmark = toys.expected_warnings


def fit_sft(tmp_path: Path, *callbacks: Callback, **settings: Any) -> CausalLM:
    torch.manual_seed(0)
    lora = LoRAConfig(rank=2, dropout=0.1)
    module = CausalLM(str(MODEL), learning_rate=1e-3, lora=lora, warmup_steps=2, schedule="linear")
    data = SFTDataModule(
        str(TRAIN), str(VALIDATION), batch_size=2, max_length=600, max_rows=24, validation_rows=6, **settings
    )
    trainer = toys.trainer(
        tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[*callbacks, LoRAGuard()], limit_val_batches=1
    )
    trainer.fit(module, data)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, "length"])
def test_a_language_model_is_trained_bit_equal_with_a_probe(packing: Any, tmp_path: Path) -> None:
    probe = BatchProbe(at=2, ratios=(0.5, 1), min_steps=1, min_epoch=0)
    modules = [fit_sft(tmp_path, packing=packing), fit_sft(tmp_path, probe, packing=packing)]
    assert toys.same(*map(toys.snapshot, modules))
    assert probe.result is not None
    assert list(probe.result.losses) == [2, 4]
    assert math.isfinite(probe.result.start_loss)


def test_the_loss_of_a_row_does_not_depend_on_the_padding_beside_it(tmp_path: Path) -> None:
    folder = toys.save_llama(tmp_path / "llama")
    module = CausalLM(str(folder), lora=LoRAConfig(rank=2))
    rows = [{name: part[: 4 + 3 * at] for name, part in row.items()} for at, row in enumerate(toys.token_rows(3, 10))]

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in fill.items()
        }

    loaders = [DataLoader(rows, size, collate_fn=collate) for size in (1, 3)]  # pyright: ignore[reportArgumentType]
    found = [
        BatchProbe(ratios=(1, 2), min_steps=1, min_epoch=0).run(module, loader, loaders[1], 1) for loader in loaders
    ]
    assert found[0].start_loss == pytest.approx(found[1].start_loss, rel=1e-5)
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-4)
