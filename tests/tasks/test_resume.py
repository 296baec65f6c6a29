"""Fine-tuning on text resumes exactly, packed or not, in the middle of an accumulation window too."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import torch

from lightning_lora import LoRAConfig
from lightning_lora.data import SFTDataModule
from lightning_lora.tasks import CausalLM
from tests.support import toys
from tests.support.resuming import Outcome, Recorder, seed_all, unlike

pytestmark = [*toys.expected_warnings, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")]

ROWS = [{"question": "what " * (1 + n % 5), "answer": "so " * (1 + n % 3)} for n in range(22)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_llama(tmp_path_factory.mktemp("models") / "llama", attention_dropout=0.1)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def run(
    llama: Path,
    text: Path,
    ckpt_path: Path | None = None,
    lora: LoRAConfig | None = None,
    places: tuple[str, ...] = (),
    **settings: Any,
) -> Outcome:
    seed_all(0 if ckpt_path is None else 99)
    recorder = Recorder(text.parent if ckpt_path is None else None, places)
    module = CausalLM(str(llama), 1e-3, lora=lora, warmup_steps=2, schedule="cosine")
    settings = {"train": str(text), "validation": str(text), "validation_rows": 4} | settings
    data = SFTDataModule(batch_size=2, max_length=28, **settings)
    trainer = toys.trainer(
        text.parent,
        callbacks=[recorder],
        max_epochs=2,
        accumulate_grad_batches=3,
        val_check_interval=3,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(text.parent / "end" / "end.ckpt")
    recorder.outcome.checkpoint = torch.load(text.parent / "end" / "end.ckpt", weights_only=True)
    return recorder.outcome


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True, "batch"])
def test_with_adapters(packing: bool | str, llama: Path, text: Path) -> None:
    again = partial(run, llama, text, lora=LoRAConfig(rank=2, dropout=0.1), packing=packing)
    places = ("batch-0-2", "batch-1-3", "validation-0-3", "epoch-0")
    whole = again(places=places)
    for place in places:
        found = unlike(whole, again(ckpt_path=text.parent / f"{place}.ckpt"))
        assert not found, f"{place}: {found[:5]}"


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_with_shares_weights_and_held_out_rows(packing: bool, llama: Path, text: Path) -> None:
    """The second epoch has other rows than the first, and the weights of an open window are no whole number."""
    text.write_text("\n".join(json.dumps(row | {"weight": 0.3 + n % 4}) for n, row in enumerate(ROWS)))
    other = text.with_name("other.jsonl")
    other.write_text("\n".join(json.dumps(row | {"answer": "no"}) for row in ROWS))
    settings = {"train": {str(text): 0.6, str(other): 0.4}, "validation": None, "validation_share": 0.3}
    again = partial(run, llama, text, lora=LoRAConfig(rank=2), packing=packing, **settings)
    places = ("batch-0-2", "batch-1-3", "epoch-0")
    whole = again(places=places)
    for place in places:
        found = unlike(whole, again(ckpt_path=text.parent / f"{place}.ckpt"))
        assert not found, f"{place}: {found[:5]}"


def test_fully_trained(llama: Path, text: Path) -> None:
    places = ("batch-1-2", "epoch-0")
    whole = run(llama, text, places=places)
    for place in places:
        found = unlike(whole, run(llama, text, text.parent / f"{place}.ckpt"))
        assert not found, f"{place}: {found[:5]}"


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True, "batch"])
def test_with_workers(packing: bool | str, llama: Path, text: Path) -> None:
    again = partial(run, llama, text, lora=LoRAConfig(rank=2, dropout=0.1), packing=packing, num_workers=2)
    places = ("batch-0-2", "batch-1-3", "epoch-0")
    whole = again(places=places)
    for place in places:
        found = unlike(whole, again(ckpt_path=text.parent / f"{place}.ckpt"))
        assert not found, f"{place}: {found[:5]}"


@pytest.mark.slow
def test_tokens_of_an_open_window_are_needed(llama: Path, text: Path) -> None:
    whole = run(llama, text, lora=LoRAConfig(rank=2), places=("batch-0-2",))
    checkpoint = torch.load(text.parent / "batch-0-2.ckpt", weights_only=True)
    assert checkpoint["lightning_lora_window_tokens"] != [0]
    checkpoint["lightning_lora_window_tokens"] = [0]
    torch.save(checkpoint, text.parent / "less.ckpt")
    assert unlike(whole, run(llama, text, text.parent / "less.ckpt", lora=LoRAConfig(rank=2)))
