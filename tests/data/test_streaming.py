"""Training rows that are read while training: each once an epoch, in an order that seed and epoch decide."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerFast

from lightning_lora import LoRAConfig
from lightning_lora.data import SFTDataModule, streaming
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.sources import HubSource
from lightning_lora.errors import ConfigError, DataError
from lightning_lora.tasks import CausalLM
from tests.data.conftest import QUIET, Write, examples
from tests.data.test_training import Bigram
from tests.support import toys
from tests.support.tiny_tokenizer import tiny_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '\\w+' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]

ROWS = [{"question": f"{n:03d}", "answer": "0" * (1 + n % 5)} for n in range(49)]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BUFFER", 10)


@pytest.fixture
def paths(write: Write) -> list[str]:
    return [write("a.jsonl", ROWS[:20]), write("b.jsonl", ROWS[20:])]


def numbers(batches: Any, tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    """The questions in each batch."""
    return [[str(tokenizer.decode(ids))[9:12] for ids, _ in examples(batch)] for batch in batches]


def epoch(data: SFTDataModule, number: int) -> list[list[str]]:
    loader = data.train_dataloader()
    sampler: Any = loader.sampler
    sampler.set_epoch(number)
    tokenizer: Any = data.tokenizer
    return numbers(loader, tokenizer)


def ready(paths: list[str], tokenizer: PreTrainedTokenizerFast, **options: Any) -> SFTDataModule:
    data = SFTDataModule(paths, tokenizer=tokenizer, streaming=True, batch_size=4, **options)
    data.setup("fit")
    return data


def test_every_row_comes_once_in_an_order_of_seed_and_epoch(
    paths: list[str], tokenizer: PreTrainedTokenizerFast, own_cache: Path
) -> None:
    data = ready(paths, tokenizer)
    orders = [epoch(data, 0), epoch(data, 1), epoch(ready(paths, tokenizer, seed=1), 0)]
    flat = [tuple(chain(*order)) for order in orders]
    assert all(sorted(order) == [row["question"] for row in ROWS] for order in flat)
    assert len({*flat, tuple(sorted(flat[0]))}) == 4
    assert epoch(ready(paths, tokenizer, num_workers=2), 1) == orders[1]
    assert not list(own_cache.rglob("*.arrow"))
    assert "train" not in data.statistics


@pytest.mark.filterwarnings("ignore:.*longer than max_length=12 tokens and cut")
def test_the_examples_are_those_of_rows_in_memory(paths: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    held = SFTDataModule(paths, tokenizer=tokenizer, batch_size=4, max_length=12)
    held.setup("fit")
    streamed = ready(paths, tokenizer, max_length=12)
    both = [sorted(chain(*map(examples, data.train_dataloader()))) for data in (held, streamed)]
    assert both[0] == both[1]


@pytest.mark.parametrize("devices", [2, 3])
def test_devices_share_the_stream(paths: list[str], tokenizer: PreTrainedTokenizerFast, devices: int) -> None:
    stream = ready(paths, tokenizer)._stream
    assert stream is not None
    whole = [row["input_ids"].tolist() for row in stream.examples(5)]
    shares = []
    for rank in range(devices):
        sampler = streaming.StreamSampler(stream, devices, rank)
        sampler.set_epoch(5)
        shares.append([row["input_ids"].tolist() for row in sampler])
    assert len({len(share) for share in shares}) == 1, "or a device would wait for the others for ever"
    together = [row for step in zip(*shares, strict=True) for row in step]
    assert together[: len(whole)] == whole
    assert all(row in whole[-devices:] for row in together[len(whole) :])


def test_a_trainer_gives_each_epoch_an_order_of_its_own(paths: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    module = Bigram(tokenizer)
    data = SFTDataModule(paths, batch_size=7, streaming=True, max_rows=42)
    Trainer(**QUIET, max_epochs=2).fit(module, datamodule=data)
    seen = numbers(module.batches, tokenizer)
    first, second = seen[:6], seen[6:]
    assert sorted(chain(*first)) == sorted(chain(*second)) == [row["question"] for row in ROWS[:42]]
    assert first != second


def test_rows_of_the_hub_are_streamed(write: Write, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """From a folder laid out as on the hub."""
    (tmp_path / "hub").mkdir()
    write("hub/train.jsonl", ROWS)
    source = HubSource(str(tmp_path / "hub"), None, "train")
    assert list(source.stream()) == list(source.rows())
    (tmp_path / "hub" / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n{bad\n')
    with pytest.raises(DataError, match=r"hub:train cannot be read.*Is it damaged"):
        list(HubSource(str(tmp_path / "hub"), None, "train").stream())


def test_bad_rows_stop_a_stream_or_are_left_out(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS) + "{bad\n" + json.dumps({"question": "a"}))
    with pytest.raises(DataError, match="2 of 51 rows cannot be used"):
        ready([path], tokenizer)
    data = SFTDataModule(path, tokenizer=tokenizer, streaming=True, on_bad_row="skip")
    with pytest.warns(UserWarning, match="left out") as caught:
        data.setup("fit")
    assert len(caught) == 2
    assert len(list(chain(*epoch(data, 0)))) == 49, "without a further warning"


def test_what_a_stream_cannot_do_is_refused(paths: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="packing: true needs all rows at once"):
        SFTDataModule(paths, streaming=True, packing=True)
    with pytest.raises(ConfigError, match="call setup"):
        SFTDataModule(paths, tokenizer=tokenizer, streaming=True).train_dataloader()
    with pytest.raises(DataError, match="does not exist"):
        ready(["absent.jsonl"], tokenizer)
    stream = ready(paths, tokenizer)._stream
    assert stream is not None
    with pytest.raises(DataError, match="no row has a supervised token"):
        list(replace(stream, settings=RowSettings(2)).examples(0))


def test_batches_of_a_stream_can_be_packed(paths: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    data = ready(paths, tokenizer, packing="batch")
    assert sorted(chain(*map(examples, data.train_dataloader()))) == sorted(
        chain(*map(examples, ready(paths, tokenizer).train_dataloader()))
    )


@pytest.mark.slow
def test_a_resumed_run_goes_on_exactly(paths: list[str], tmp_path: Path) -> None:
    folder = str(toys.save_llama(tmp_path / "base"))

    def run(steps: int, ckpt: Path | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = CausalLM(folder, lora=LoRAConfig(rank=2), dtype="float32", schedule="constant")
        trainer = Trainer(**QUIET, default_root_dir=tmp_path / "run", max_steps=steps, max_epochs=-1)
        trainer.fit(module, datamodule=SFTDataModule(paths, batch_size=4, streaming=True), ckpt_path=ckpt)
        if ckpt is None and steps == 16:
            trainer.save_checkpoint(tmp_path / "middle.ckpt")
        return {name: value.clone() for name, value in module.state_dict().items() if "lora" in name.lower()}

    whole = run(20)
    run(16)  # in the second epoch of 13 batches
    resumed = run(20, tmp_path / "middle.ckpt")
    assert whole
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_schedule_that_needs_the_number_of_steps_says_so(paths: list[str], tmp_path: Path) -> None:
    module = CausalLM(str(toys.save_llama(tmp_path)), lora=LoRAConfig(rank=2), dtype="float32", schedule="cosine")
    data = SFTDataModule(paths, batch_size=4, streaming=True)
    with pytest.raises(
        ConfigError, match=r"needs the number of steps, and a stream does not tell: set trainer\.max_steps"
    ):
        Trainer(**QUIET, max_epochs=1).fit(module, datamodule=data)


def test_tiny_tokenizers_agree() -> None:
    """The questions are read off the decoded rows at a fixed place."""
    assert tiny_tokenizer().decode(tiny_tokenizer()("<|user|>\n012")["input_ids"])[9:12] == "012"
