"""Prompts for reinforcement learning: which rows are read, what a reward is given, and what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DistributedSampler

from lightning_lora.cli.generate.run_settings import read_run_settings
from lightning_lora.data import PromptDataModule, SFTDataModule
from lightning_lora.errors import ConfigError, DataError
from tests.support import toys
from tests.support.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def written(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def module(train: str | list[str], **settings: Any) -> PromptDataModule:
    data = PromptDataModule(train, **{"tokenizer": TOKENIZER, **settings})
    data.setup("fit")
    return data


def asked(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "gsm8k": ({"question": "2+3?", "answer": "five #### 5"}, "2+3?", {"answer": "five #### 5"}),
    "prompt": ({"prompt": "2+3?", "label": 5}, "2+3?", {"label": 5}),
    "prompt and completion": ({"prompt": "2+3?", "completion": "5"}, "2+3?", {"completion": "5"}),
    "messages": ({"messages": asked(("user", "2+3?")), "tests": ["a"]}, "2+3?", {"tests": ["a"]}),
    "answered messages": ({"messages": asked(("user", "2+3?"), ("assistant", "5"))}, "2+3?", {"answer": "5"}),
    "turns": (
        {"messages": asked(("user", "a"), ("assistant", "b"), ("user", "c"))},
        asked(("user", "a"), ("assistant", "b"), ("user", "c")),
        {},
    ),
    "system": (
        {"system": "Be brief.", "question": "2+3?", "answer": "5"},
        asked(("system", "Be brief."), ("user", "2+3?")),
        {"answer": "5"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_and_the_other_columns_reach_the_reward(case: str, tmp_path: Path) -> None:
    row, prompt, columns = CASES[case]
    (batch,) = module(written(tmp_path, [row])).train_dataloader()
    assert batch["prompts"] == [prompt]
    assert batch["columns"] == {name: [value] for name, value in columns.items()}
    messages = asked(("user", prompt)) if isinstance(prompt, str) else prompt
    text: Any = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert batch["input_ids"][0].tolist() == TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [True, False])
def test_a_prompt_is_what_stood_before_the_answer_in_supervised_training(template: bool, tmp_path: Path) -> None:
    tokenizer = TOKENIZER if template else tiny_tokenizer(None)
    file = written(tmp_path, [{"question": "two and three?", "answer": "five"}])
    supervised = SFTDataModule(file, tokenizer=tokenizer)
    supervised.setup("fit")
    row: Any = supervised.rows["train"][0]
    (batch,) = module(file, tokenizer=tokenizer).train_dataloader()
    prompt = batch["input_ids"][0].tolist()
    assert prompt == row["input_ids"][: len(prompt)]
    assert row["supervised"].index(True) == len(prompt)


def test_names_of_columns_may_be_the_files_own(tmp_path: Path) -> None:
    file = written(tmp_path, [{"frage": "2+3?", "loesung": "5", "quelle": "x"}])
    (batch,) = module(file, columns={"frage": "question", "loesung": "answer"}).train_dataloader()
    assert batch["prompts"] == ["2+3?"]
    assert batch["columns"] == {"answer": ["5"], "quelle": ["x"]}


def test_lines_of_a_text_file_are_prompts_and_missing_columns_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one?\n\ntwo?\n")
    file = written(tmp_path, [{"prompt": "three?", "label": 3}])
    data = module([str(tmp_path / "a.txt"), file], batch_size=3)
    data.rows["test"] = data.rows["train"]
    (batch,) = data.test_dataloader()
    assert batch["prompts"] == ["one?", "two?", "three?"]
    assert batch["columns"] == {"label": [None, None, 3]}
    assert all(ids.dtype == torch.int64 and ids.dim() == 1 for ids in batch["input_ids"])


def many(folder: Path, count: int = 10) -> str:
    return written(folder, [{"prompt": f"number {number}?"} for number in range(count)])


def test_the_order_depends_on_seed_and_epoch_only(tmp_path: Path) -> None:
    def order(seed: int, epoch: int, draws: int) -> list[str]:
        torch.manual_seed(draws)
        loader = module(many(tmp_path), seed=seed, batch_size=4).train_dataloader()
        assert isinstance(loader.sampler, DistributedSampler)
        loader.sampler.set_epoch(epoch)
        return [prompt for batch in loader for prompt in batch["prompts"]]

    first = order(0, 0, 0)
    assert sorted(first) == sorted(f"number {number}?" for number in range(10))
    assert first == order(0, 0, 1)
    assert len({tuple(order(seed, epoch, 0)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_max_rows_takes_the_first_rows(tmp_path: Path) -> None:
    data = module(many(tmp_path), max_rows=3, validation=many(tmp_path), validation_rows=2)
    assert [len(data.rows[split]) for split in ("train", "validation")] == [3, 2]


LONG = "The longest one is " + "long " * 40 + "?"


def test_a_long_prompt_is_refused_or_left_out_and_told(tmp_path: Path) -> None:
    file = written(tmp_path, [{"prompt": "short?"}, {"prompt": LONG}])
    told = (
        r"train: 1 of 2 rows have prompts of more than 30 tokens, which is max_prompt_length; the longest has \d+ \(.*"
    )
    with pytest.raises(DataError, match=told + "row 1.*leave them out with on_long_prompt: skip"):
        module(file, max_prompt_length=30)
    with pytest.warns(UserWarning, match=told + "They are left out"):
        data = module(file, max_prompt_length=30, on_long_prompt="skip")
    assert [row.prompt for row in data.rows["train"]] == ["short?"]
    with pytest.raises(DataError, match="2 of 2 rows have prompts of more than 2 tokens"):
        module(file, max_prompt_length=2, on_long_prompt="skip")


class Small(LightningModule):
    """A task of which a data module asks tokenizer and context."""

    tokenizer, context_length = TOKENIZER, 20

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[Any] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        self.seen.append((batch["prompts"], [len(ids) for ids in batch["input_ids"]], batch["columns"]))
        return self.layer.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Trying to infer the `batch_size`")
def test_a_run_gets_prompts_and_refuses_those_beyond_the_context(tmp_path: Path) -> None:
    task = Small()
    file = written(tmp_path, [{"prompt": "hi?", "label": 1}, {"prompt": "what?", "label": 2}])
    toys.trainer(tmp_path, max_epochs=1).fit(task, datamodule=PromptDataModule(file, batch_size=2))
    ((prompts, lengths, columns),) = task.seen
    assert dict(zip(prompts, columns["label"], strict=True)) == {"hi?": 1, "what?": 2}
    assert all(lengths)
    file = written(tmp_path, [{"prompt": LONG}])
    with pytest.raises(DataError, match=r"more than 19 tokens, which is the context of the model \(20\), less one"):
        toys.trainer(tmp_path, max_epochs=1).fit(task, datamodule=PromptDataModule(file))


def test_duplicates_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = written(tmp_path, [{"prompt": text} for text in ("a?", "b?", "a?", "a?")])
    with caplog.at_level("INFO"):
        module(file)
    assert "train: 2 of 4 rows repeat the prompt of an earlier row (one occurs 3 times)" in caplog.text


def test_rows_without_a_prompt_are_refused_or_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "a?"}, {"messages": asked(("assistant", "hi"))}, {"prompt": "b?", "completions": "x"}]
    file = written(tmp_path, rows)
    with pytest.raises(DataError) as caught:
        module(file)
    assert "nothing comes before the answer" in str(caught.value)
    assert "the column 'completions' has the name of an argument of a reward: rename it." in str(caught.value)
    with pytest.warns(UserWarning, match="2 of 3 rows cannot be used"):
        data = module(file, on_bad_row="skip")
    assert [row.prompt for row in data.rows["train"]] == ["a?"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
        ({"max_prompt_length": 0}, "max_prompt_length must be a whole number of 1 or more, got 0"),
        ({"on_long_prompt": "drop"}, "on_long_prompt must be one of"),
        ({"on_bad_row": "drop"}, "on_bad_row must be one of"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptDataModule("rows.jsonl", **settings)


def test_a_stage_without_prompts_is_refused(tmp_path: Path) -> None:
    data = PromptDataModule(many(tmp_path), tokenizer=TOKENIZER)
    with pytest.raises(ConfigError, match="test needs test prompts: give test="):
        data.setup("test")
    with pytest.raises(ConfigError, match="no train prompts are loaded; give train= and call setup"):
        data.train_dataloader()


def test_generate_asks_as_a_run_on_prompts_has_asked(tmp_path: Path) -> None:
    config = "data: {class_path: lightning_lora.data.PromptDataModule, init_args: {prompt_separator: ' -> '}}"
    (tmp_path / "config.yaml").write_text(config)
    assert read_run_settings(tmp_path).rows.prompt_separator == " -> "
