"""Every bad input of the catalogue (B72-B77, B79, B82): one error that says what, where and what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from lightning_lora.errors import ConfigError, DataError
from tests.data.conftest import Write
from tests.support.tiny_tokenizer import STRICT, UNMARKED, tiny_tokenizer

GOOD = {"question": "Hello", "answer": "five"}


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "five"} for role in roles]}


FILES = {
    "empty file": ("a.jsonl", "", r"a\.jsonl has no rows"),
    "blank file": ("a.jsonl", "\n\n", r"a\.jsonl has no rows"),
    "empty list": ("a.json", "[]", r"a\.json has no rows"),
    "only a header": ("a.csv", "question,answer\n", r"a\.csv has no rows"),
    "bad line": ("a.jsonl", '{"text": "a"}\n\n{bad\n', r"a\.jsonl, line 3, column 2: not JSON"),
    "cut line": ("a.jsonl", '{"text": "a"}\n{"text": "', r"a\.jsonl, line 2, column 10: not JSON"),
    "bad list": ("a.json", '\n[{"text": "a"},\n{bad}]', r"a\.json, line 3, column 2: not JSON"),
    "not an object": (
        "a.jsonl",
        '{"text": "a"}\n[1, 2]\n',
        r"a\.jsonl, line 2: a row must be an object .* list: \[1, 2\]",
    ),
    "list of texts": ("a.json", '["a", "b"]', r"a\.json, row 0: a row must be an object .* str: 'a'"),
    "not UTF-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"a\.jsonl, line 2: not UTF-8"),
    "not UTF-8 list": ("a.json", b'[{"text": "a"},\n{"text": "\xe9"}]', r"a\.json cannot be read"),
    "not UTF-8 csv": ("a.csv", b"text\na\n\xe9\n", r"a\.csv cannot be read"),
    "damaged csv": ("a.csv", 'question,answer\na,b\n"a,b\n', r"a\.csv cannot be read after row 0"),
    "long csv row": ("a.csv", "question,answer\na,b\na,b,c\n", r"a\.csv, line 3: does not have the 2 fields"),
    "short csv row": ("a.csv", "question,answer\na\n", r"a\.csv, line 2: does not have the 2 fields"),
    "a column twice": (
        "a.csv",
        "question,question,answer\na,b,c\n",
        r"a\.csv: the header names 'question' more than once",
    ),
    "a huge number": ("a.jsonl", f'{{"text": {"9" * 5000}}}', r"a\.jsonl, line 1: a number that cannot be read"),
    "damaged parquet": ("a.parquet", b"PAR1 and so on", r"a\.parquet cannot be read"),
    "not an archive": ("a.jsonl.gz.jsonl.gz", None, r"cannot be read"),
    "unknown columns": (
        "a.jsonl",
        [{"q": 1, "a": 2}],
        r"row 0 \(line 1\): the columns 'q', 'a' fit no known format.*question \+ answer",
    ),
    "no columns": ("a.jsonl", [{}], r"the columns \(none\) fit no known format"),
    "missing column": ("a.jsonl", [GOOD, {"question": "a"}], r"row 1 \(line 2\): no 'answer'; it has 'question'"),
    "None": ("a.jsonl", [GOOD, GOOD, {**GOOD, "answer": None}], r"row 2 \(line 3\): 'answer' must be text, got None"),
    "number": ("a.jsonl", [{**GOOD, "question": 5}], r"row 0 \(line 1\): 'question' must be text, got 5 \(int\)"),
    "list": ("a.jsonl", [{"text": ["a" * 99]}], r"'text' must be text, got \['a{58}\.\.\. \(list\)"),
    "empty completion": ("a.jsonl", [GOOD, {**GOOD, "answer": ""}], r"row 1 \(line 2\): 'answer' is empty"),
    "blank prompt": ("a.jsonl", [{**GOOD, "question": " \n"}], r"row 0 \(line 1\): 'question' is empty"),
    "empty text": ("a.jsonl", [{"text": ""}], r"row 0 \(line 1\): 'text' is empty"),
    "empty csv field": ("a.csv", "question,answer\na,b\nc,\n", r"row 1 \(line 3\): 'answer' is empty"),
    "wrong input": ("a.jsonl", [{"instruction": "a", "input": 5, "output": "b"}], r"'input' must be text, got 5"),
    "half a character": (
        "a.jsonl",
        '{"text": "a\\ud83d"}',
        r"row 0 \(line 1\): 'text' has half a character \(a lone surrogate\) at 1",
    ),
    "messages no list": ("a.jsonl", [{"messages": "hello"}], r"'messages' must be a list of turns .* got 'hello'"),
    "no messages": ("a.jsonl", [{"messages": []}], r"'messages' must be a list of turns"),
    "turn no object": (
        "a.jsonl",
        [{"messages": ["hello"]}],
        r"messages\[0\]: a turn has 'role' and 'content', got 'hello'",
    ),
    "no content": ("a.jsonl", [{"messages": [{"role": "user"}]}], r"messages\[0\]: no 'content'; it has 'role'"),
    "None content": (
        "a.jsonl",
        [{"messages": [{"role": "user", "content": None}]}],
        r"messages\[0\]: 'content' must be text",
    ),
    "empty turn": ("a.jsonl", [{"messages": [{"role": "user", "content": ""}]}], r"messages\[0\]: 'content' is empty"),
    "unknown role": (
        "a.jsonl",
        [turns("usr")],
        r"messages\[0\]: unknown role 'usr'; did you mean 'user'\?.*system, user, assistant",
    ),
    "ShareGPT role": (
        "a.jsonl",
        [{"conversations": [{"from": "gptt", "value": "a"}]}],
        r"conversations\[0\]: unknown role 'gptt'; did you mean 'gpt'.*human, .*gpt",
    ),
    "no answer": (
        "a.jsonl",
        [turns("user", "assistant"), turns("system", "user")],
        r"row 1 .*: the assistant has no turn",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_refused(write: Write, tokenizer: PreTrainedTokenizerFast, case: str) -> None:
    name, content, message = FILES[case]
    path = write(name, content if content is not None else "")
    if content is None:
        Path(path).write_bytes(b"not an archive")
    with pytest.raises(DataError, match=message) as caught:
        SFTDataModule(path, tokenizer=tokenizer).setup()
    assert path in str(caught.value)


THINKS = UNMARKED.replace("<|assistant|>{{ '\n' }}{{ '' }}{% endif %}", "<|assistant|>{{ '\n' }}<think>{% endif %}")

TEMPLATES = {
    "refused": (
        STRICT,
        [turns("user", "assistant"), turns("system", "user", "assistant")],
        r"row 1 .*: the chat template refuses this conversation: no system turn, please",
    ),
    "other words in the prompt": (
        THINKS,
        [turns("user", "assistant")],
        r"row 0 .*: what the model writes after the prompt cannot be told: .* The prompt goes on with '<think>', the "
        r"finished answer with ",
    ),
    "wrong type": (
        "{% for m in messages %}\n{{ m.content + 5 }}{% endfor %}",
        [turns("user", "assistant")],
        r"row 0 .*: the chat template refuses this conversation: TypeError: .* \(line 2 of the template\)",
    ),
    "starts with the assistant": (UNMARKED, [turns("assistant", "user")], r"row 0 .*: starts with the assistant"),
    "several turns": (
        None,
        [turns("user", "assistant"), turns("user", "assistant", "user", "assistant")],
        r"row 1 .*: the tokenizer has no chat template",
    ),
    "system turn": (None, [turns("system", "user", "assistant")], r"row 0 .*: the tokenizer has no chat template"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_conversations_a_template_cannot_take_are_refused(write: Write, case: str) -> None:
    template, rows, message = TEMPLATES[case]
    with pytest.raises(DataError, match=message):
        SFTDataModule(write("a.jsonl", rows), tokenizer=tiny_tokenizer(template)).setup()


NAMES = {
    "absent file": ("absent.jsonl", r"'absent.jsonl' does not exist \(looked from"),
    "absent zipped file": ("absent.csv.gz", r"does not exist"),
    "absent path": ("./absent", r"'./absent' does not exist"),
    "absolute path": ("/absent/file", r"does not exist"),
    "deep path": ("a/b/c", r"does not exist"),
    "in a folder that exists": ("folder/train", r"does not exist"),
    "no match": ("*.jsonl", r"'\*.jsonl' matches no file"),
    "folder": ("folder", r"'folder' is a folder; name the files in it, for example 'folder/\*.jsonl'"),
    "unknown kind": (
        "notes.md",
        r"'notes.md' is of an unknown kind; known kinds: .json, .jsonl, .csv, .tsv, .txt, .parquet",
    ),
    "nothing named": ([], r"train is an empty list"),
    "hub": ("nobody/nothing", r"'nobody/nothing' is not a file on disk, and split 'train' of a hub dataset"),
    "hub split": ("nobody/nothing:main:half", r"split 'half' of a hub dataset"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_nothing_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.md").write_text("hello")
    names, message = NAMES[case]
    with pytest.raises(DataError, match=message):
        SFTDataModule(names, tokenizer=tokenizer).setup()


def test_a_file_that_exists_is_never_asked_from_the_hub(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.chdir(tmp_path)
    write("gsm8k", "hello")
    with pytest.raises(DataError, match="'gsm8k' is of an unknown kind"):
        SFTDataModule("gsm8k", tokenizer=tokenizer).setup()


def test_rows_that_lose_every_answer_are_refused(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    data = SFTDataModule(write("a.jsonl", [GOOD] * 3), tokenizer=tokenizer, max_length=2)
    with pytest.raises(DataError, match=r"train: no row has a supervised token: 3 of 3 rows longer than max_length=2"):
        data.setup()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("fit", "fit needs train rows"),
        ("validate", "validate needs validation"),
        ("test", "test needs test rows"),
        ("predict", "predict needs test rows"),
    ],
)
def test_a_stage_without_its_rows_is_refused(tokenizer: PreTrainedTokenizerFast, stage: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SFTDataModule(None, tokenizer=tokenizer).setup(stage)


def test_a_loader_before_setup_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"no train rows are loaded; give train= and call setup\(\) first"):
        SFTDataModule("a.jsonl", tokenizer=tokenizer).train_dataloader()


def test_tokenizers_that_are_none_are_refused(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.jsonl", [{"text": "a"}])
    (tmp_path / "broken").mkdir()
    silent = tiny_tokenizer()
    silent.eos_token = None
    padless = tiny_tokenizer()
    padless.eos_token = padless.pad_token = None
    given: list[tuple[Any, str]] = [
        (None, "no tokenizer: none was given and there is no model yet. Pass tokenizer="),
        (5, "tokenizer must be a text or a PreTrainedTokenizerBase or None, got 5"),
        (str(tmp_path / "absent"), r"tokenizer folder .*absent' does not exist"),
        (str(tmp_path / "broken"), r"tokenizer .*broken' cannot be loaded"),
        (silent, "the tokenizer has no eos_token"),
        (padless, "neither a pad_token nor an eos_token"),
    ]
    for tokenizer, message in given:
        with pytest.raises(ConfigError, match=message):
            SFTDataModule(path, tokenizer=tokenizer).setup()


class Model(LightningModule):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def attached(data: SFTDataModule, module: LightningModule) -> SFTDataModule:
    """Attach a Trainer as it does itself before it calls setup."""
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.trainer.strategy.connect(module)
    return data


def test_a_model_without_tokenizer_is_named(write: Write) -> None:
    data = attached(SFTDataModule(write("a.jsonl", [GOOD])), Model())
    with pytest.raises(ConfigError, match=r"Model has no attribute 'tokenizer'\. Pass tokenizer="):
        data.setup()


def test_ids_beyond_the_vocabulary_are_refused_with_their_row(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "a b"}, {"text": "five the answer"}]
    data = SFTDataModule(write("a.jsonl", rows), tokenizer=tokenizer)
    data.setup()
    largest = max(data.rows["train"][1]["input_ids"])
    bad = [i for i in data.rows["train"][1]["input_ids"] if i == largest]
    with pytest.raises(
        DataError, match=rf"row 1 \(line 2\): token ids \[{bad[0]}\] are not below .*vocab_size={largest} \(1 of 2"
    ):
        attached(data, Model(vocab_size=largest)).setup()
    attached(data, Model(vocab_size=largest + 1)).setup()
    with pytest.raises(ConfigError, match="the padding id 0 is not below the model's vocab_size=0"):
        attached(data, Model(vocab_size=0)).setup()


def test_code_from_elsewhere_is_never_run(write: Write, tmp_path: Path) -> None:
    folder, proof = tmp_path / "model", tmp_path / "proof"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w')\n")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "evil.Evil"]}}')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        SFTDataModule(write("a.jsonl", [GOOD]), tokenizer=str(folder)).setup()
    assert not os.path.exists(proof)
    assert AutoTokenizer is not None
