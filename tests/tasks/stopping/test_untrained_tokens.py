"""Tokens that pre-training never met: LoRA below a frozen output layer cannot learn them, and the run says so."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_lora import LoRAConfig
from lightning_lora.data import SFTDataModule
from lightning_lora.tasks import CausalLM
from lightning_lora.tasks.untrained_tokens import frozen_output, untrained_tokens
from tests.support import toys
from tests.support.tiny_tokenizer import SPECIALS

pytestmark = toys.expected_warnings

PAD, END = SPECIALS.index("<|pad|>"), SPECIALS.index("<|end|>")
NUM_EQUAL = 40
UNTRAINED = "was never trained on '<|end|>'"
CHATS = '{"question": "what", "answer": "ok"}\n'


def trained_table() -> Tensor:
    return torch.randn(500, 24, generator=torch.Generator().manual_seed(0))


def equal(table: Tensor) -> Tensor:
    """As pre-training leaves tokens that no text holds: one row, and the noise of rounding."""
    noise = torch.randn(NUM_EQUAL, 24, generator=torch.Generator().manual_seed(1))
    table[:NUM_EQUAL] = table[0] + 2e-3 * table[0].norm() / 24**0.5 * noise
    return table


def resized(table: Tensor) -> Tensor:
    table[END] = torch.cat([table[:END], table[END + 1 :]]).mean(0)
    return table


def empty(table: Tensor) -> Tensor:
    table[END] = 1e-6
    return table


def copied_from_the_other_stop(table: Tensor) -> Tensor:
    table[END] = table[PAD]
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "found"),
    [(equal, [END]), (resized, [END]), (empty, [END]), (copied_from_the_other_stop, []), (lambda table: table, [])],
)
def test_rows_that_cannot_be_told_from_others_are_found(change: Any, found: list[int], dtype: torch.dtype) -> None:
    assert untrained_tokens(change(trained_table()).to(dtype), [END], [PAD, END], None) == found


def test_a_copy_of_a_row_that_does_not_end_an_answer_is_found() -> None:
    assert untrained_tokens(copied_from_the_other_stop(trained_table()), [END], [END], None) == [END]


def test_tokens_that_were_added_count_as_untrained() -> None:
    assert untrained_tokens(trained_table(), [END, 498, 499], [END], 499) == [499]
    assert untrained_tokens(trained_table(), [END, 700], [END], 500) == [700]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "apart"])
def untrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which ``<|end|>`` has the row of many other tokens."""
    return flattened(tmp_path_factory.mktemp("untrained") / "llama", tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_llama(tmp_path_factory.mktemp("trained") / "llama", tie_word_embeddings=True)


def flattened(folder: Path, **settings: Any) -> Path:
    toys.save_llama(folder, **settings)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for table in {id(t): t for t in (model.get_input_embeddings().weight, model.lm_head.weight)}.values():
            table[:NUM_EQUAL] = table[PAD] + 1e-3 * table[PAD].norm() / 4 * torch.randn(NUM_EQUAL, 16)
    model.save_pretrained(folder)
    return folder


def said(folder: Path, out: Path, lora: Any, rows: str = CHATS, module: Any = None, **options: Any) -> list[str]:
    """What the start of a run warns of, about tokens."""
    (out / "rows.jsonl").write_text(rows * 4)
    max_length = options.pop("max_length", 40)
    module = CausalLM(str(folder), 1e-3, lora=lora, **options) if module is None else module
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = toys.trainer(out, max_epochs=2)
        trainer.fit(module, datamodule=SFTDataModule(str(out / "rows.jsonl"), batch_size=2, max_length=max_length))
    return [str(warning.message) for warning in caught if "never trained on" in str(warning.message)]


def test_a_run_that_cannot_learn_to_stop_says_so_once(untrained: Path, tmp_path: Path) -> None:
    (message,) = said(untrained, tmp_path, LoRAConfig(rank=2))
    assert UNTRAINED in message
    assert "cannot learn to stop" in message
    is_tied = AutoModelForCausalLM.from_pretrained(untrained).config.tie_word_embeddings
    advice = "and tied_weights='both' (or 'untie')" if is_tied else "and adapt_embeddings=True (their embeddings"
    assert f"adapt_head=True {advice}" in message


def test_a_trained_end_token_is_no_matter(trained: Path, tmp_path: Path) -> None:
    assert said(trained, tmp_path, LoRAConfig(rank=2)) == []


SILENT: dict[str, dict[str, Any]] = {
    "the head is adapted": {"lora": {"rank": 2, "adapt_head": True, "tied_weights": "untie"}},
    "the shared weight is adapted": {"lora": {"rank": 2, "adapt_head": True, "tied_weights": "both"}},
    "the head is trained in full": {"lora": {"rank": 2, "trainable": ["lm_head"]}},
    "everything is trained": {"lora": None},
    "no answer is whole": {"lora": {"rank": 2}, "rows": CHATS.replace("ok", "0 1 2 3 4 5 6 7 8 9"), "max_length": 16},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SILENT)
def test_nothing_is_said_where(name: str, untrained: Path, tmp_path: Path) -> None:
    assert said(untrained, tmp_path, **SILENT[name]) == []


@pytest.mark.filterwarnings("ignore")
def test_it_is_said_after_a_validation_and_in_every_run(untrained: Path, tmp_path: Path) -> None:
    module = CausalLM(str(untrained), 1e-3, lora=LoRAConfig(rank=2))
    (tmp_path / "rows.jsonl").write_text(CHATS * 4)
    toys.trainer(tmp_path).validate(module, SFTDataModule(validation=str(tmp_path / "rows.jsonl")), verbose=False)
    for _ in range(2):
        assert len(said(untrained, tmp_path, None, module=module)) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_quantised_base_is_looked_at_too(untrained: Path, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    lora = LoRAConfig(rank=2)
    assert len(said(untrained, tmp_path, lora, quantization="nf4", dtype="bfloat16")) == 1
    assert said(trained, tmp_path, lora, quantization="nf4", dtype="bfloat16") == []


class Resized(CausalLM):
    """Gives the end of a turn a new token, as users do with a base that was never trained on chats."""

    def configure_model(self) -> None:
        is_new = self.model is None
        super().configure_model()
        if is_new and self.model is not None:
            self.model.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)


@pytest.mark.filterwarnings("ignore")
def test_a_token_that_was_added_is_told(trained: Path, tmp_path: Path) -> None:
    module = Resized(str(trained), 1e-3, lora=LoRAConfig(rank=2))
    module.tokenizer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    module.tokenizer.chat_template = module.tokenizer.chat_template.replace("<|end|>", "<|done|>")
    module.configure_model()
    (message,) = said(trained, tmp_path, None, module=module)
    assert "was never trained on '<|done|>'" in message
    assert "cannot learn to stop" in message


@pytest.mark.slow
@pytest.mark.parametrize("untied", [False, True], ids=["head frozen", "head adapted"])
def test_only_an_adapted_head_learns_to_stop(untied: bool, tmp_path: Path) -> None:
    """With equal rows the end has at most its share of their probability, however long the training is."""
    folder = flattened(tmp_path / "llama", tie_word_embeddings=True)
    with torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        model.lm_head.weight[:NUM_EQUAL] = model.lm_head.weight[PAD].clone()
    model.save_pretrained(folder)
    lora: dict[str, Any] = {"rank": 8} | ({"adapt_head": True, "tied_weights": "untie"} if untied else {})
    module = CausalLM(str(folder), 2e-3, lora=lora)
    batch = {"input_ids": torch.tensor([[4, 70, 5, END]]), "labels": torch.tensor([[-100, -100, -100, END]])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows: Any = [{k: v[0] for k, v in batch.items()}] * 8
        loader: Any = torch.utils.data.DataLoader(rows, batch_size=4)
        toys.trainer(tmp_path, max_epochs=60).fit(module, loader)
    assert module.model is not None
    logits = module(batch["input_ids"], batch["attention_mask"])[0, 2]
    loss = float(-logits.log_softmax(-1)[END].detach())
    assert loss < 0.1 if untied else loss >= math.log(NUM_EQUAL) - 1e-4


def test_heads_that_learn_are_left_alone(trained: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(trained)
    assert frozen_output(model) is None  # as it requires gradients
    model.requires_grad_(False)
    assert frozen_output(model) is model.lm_head.weight
    model.lm_head = nn.Identity()
    assert frozen_output(model) is None


FSDP = """
import sys, warnings
from pathlib import Path
from lightning_lora import LoRAConfig
from lightning_lora.sharding import FSDP2Strategy
from tests.support import toys
from tests.tasks.stopping.test_untrained_tokens import said
import torch, datasets.config, tempfile

untrained, trained, strategy, out = sys.argv[1:]
datasets.config.HF_DATASETS_CACHE = Path(out) / "cache"
make = {"ddp": lambda: "ddp", "fsdp2": lambda: FSDP2Strategy()}[strategy]
plain = toys.trainer
toys.trainer = lambda folder, **options: plain(folder, devices=2, strategy=make(), **options)
for folder in (untrained, trained):
    print(len(said(Path(folder), Path(out), LoRAConfig(rank=2))))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_sharded_runs_say_it_too(strategy: str, trained: Path, tmp_path: Path) -> None:
    untrained = flattened(tmp_path / "llama", tie_word_embeddings=True)
    done = toys.run_python(FSDP, untrained, trained, strategy, tmp_path, ranks=2)
    assert [line for line in done.stdout.splitlines() if line in "01"] == ["1", "0"]
