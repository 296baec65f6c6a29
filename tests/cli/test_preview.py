"""``preview`` shows rows as the model sees them, with the trained tokens marked, and writes and loads nothing."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lora.cli import main as cli
from lightning_lora.cli.embedded import MODEL
from lightning_lora.cli.preview import HEAD, TAIL, expand_arguments, segments, show_row
from lightning_lora.errors import ConfigError
from tests.support.commands import EMBEDDED, configs
from tests.support.toys import tree

ROWS = [
    {"question": "Two lines:\nwhat now?", "answer": "Yes.\nNo."},
    {"question": "\x1b[31m[red] \u202e", "answer": "[[a]] \t\x07 ünï \U0001f469\u200d\U0001f467"},
    {"question": "long", "answer": "word " * 700},
    {"question": "fourth", "answer": "unseen"},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-lora"])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # no weights
    return tmp_path


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_rows_are_shown_as_the_model_sees_them(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = tree(folder)
    assert cli.main(["preview", "rows.jsonl", "--model", str(MODEL), "--data.init_args.max_length=600"]) == 0
    printed = capsys.readouterr()
    assert tree(folder) == before
    assert printed.err == ""
    assert "lightning" not in caplog.text
    first, second, third, counts = printed.out.split("\n\n")
    assert first.splitlines() == [
        "row 1, rows.jsonl, row 0 (line 1): 24 tokens, 7 trained",
        "        | <|user|>⏎",
        "        | Two lines:⏎",
        "        | what now?<|end|>⏎",
        "        | <|assistant|>⏎",
        "trained | Yes.⏎",
        "trained | No.<|end|>",
    ]
    assert "        | \\x1b[31m[red] \\u202e<|end|>⏎" in second
    assert "trained | [[a]] \\t\\x07 ünï \U0001f469\u200d\U0001f467<|end|>" in second
    assert "600 tokens (cut, 111 more are left out)" in third
    assert f"... {600 - HEAD - TAIL} tokens are not shown ..." in third
    assert re.search(r"train: 4 rows, .* trained \(\d\d\.\d%\); 1 rows cut at max_length=600", counts)
    assert "note: train: 1 of 4 rows longer than max_length=600 tokens and cut" in counts
    assert "unseen" not in printed.out


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_it_takes_what_fit_takes(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = [*configs("sft.yaml", "lora.yaml", "packing.yaml", "strategy/fsdp2.yaml"), *EMBEDDED]
    assert cli.main(["preview", *settings, "--data.init_args.train=rows.jsonl"]) == 0
    printed = capsys.readouterr()
    assert "train: 4 rows packed into" in caplog.text
    assert "validation: " in printed.out
    assert list(folder.iterdir()) == [folder / "rows.jsonl"]


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_rows_of_a_stream_are_shown_as_they_are_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = ["--data.init_args.streaming=true", "--data.init_args.max_length=600"]
    assert cli.main(["preview", "rows.jsonl", f"--model={MODEL}", *stream]) == 0
    printed = capsys.readouterr().out
    assert printed.count(", as drawn from the stream: ") == 3
    assert "trained | " in printed


def test_segments_join_to_the_text_of_the_row_wherever_the_mask_changes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "<|user|>\nGrüße \U0001f469\u200d\U0001f467, 12 + 3<|end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for place in range(len(ids) + 1):
        mask = [index >= place for index in range(len(ids))]
        found = segments(tokenizer, ids, mask)
        assert "".join(segment for segment, _ in found) == text
        assert [trained for _, trained in found] == sorted({trained for _, trained in found})
    every_other = segments(tokenizer, ids, [index % 2 == 0 for index in range(len(ids))])
    assert "".join(segment for segment, _ in every_other) == text


@pytest.mark.parametrize("colours", [True, False])
def test_trained_text_is_coloured_on_a_terminal_only(colours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer("ask<|end|>answer", add_special_tokens=False)["input_ids"]
    supervised = [index == len(ids) - 1 for index in range(len(ids))]
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False, color_system="standard")
    show_row(
        console, tokenizer, {"input_ids": ids, "supervised": supervised, "length": len(ids), "place": "x"}, "row 1"
    )
    output: Any = console.file
    lines = output.getvalue().splitlines()
    (trained,) = (line for line in lines if line.startswith("trained | "))
    assert ("32m" in trained) == colours
    assert not any("32m" in line for line in lines if line != trained)


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_a_terminal_without_these_characters_gets_escapes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert cli.main(["preview", "rows.jsonl", f"--model={MODEL}", "--data.init_args.max_rows=2"]) == 0
    printed = written.getvalue().decode("ascii")
    assert "trained | Yes.\\n\n" in printed
    assert "\\xfcn\\xef \\U0001f469\\u200d\\U0001f467<|end|>" in printed


def test_short_arguments_stand_for_those_of_fit() -> None:
    long = ["--model=lightning_lora.tasks.CausalLM", "--data=lightning_lora.data.SFTDataModule"]
    named = ["--model.init_args.model=base", "--data.init_args.train=a.csv"]
    assert expand_arguments(["a.csv", "--model", "base"]) == [*long, *named]
    assert expand_arguments(["--model=base", "a.csv", "--x", "1"]) == [*long, *named, "--x=1"]
    assert expand_arguments(["a.csv", "--config=sft.yaml"]) == ["--config=sft.yaml", named[1]]
    assert expand_arguments(["a.csv", "b.csv", "-c", "sft.yaml"])[-1] == "--data.init_args.train=['a.csv', 'b.csv']"
    assert expand_arguments(["--config=sft.yaml"]) == ["--config=sft.yaml"]
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        expand_arguments(["a.csv"])


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_pairs_are_shown_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "What now?", "chosen": "Yes.", "rejected": "No."}))
    settings = ["--data.init_args.train=pairs.jsonl", "--data.init_args.validation_share=null"]
    command = [*configs("dpo.yaml", "lora.yaml"), f"--model.init_args.model={MODEL}", *settings]
    assert cli.main(["preview", *command]) == 0
    chosen, rejected, counts = capsys.readouterr().out.split("\n\n")
    assert chosen.startswith("pair 1, chosen, pairs.jsonl, row 0 (line 1): ")
    assert "trained | Yes.<|end|>" in chosen
    assert rejected.startswith("pair 1, rejected, pairs.jsonl, row 0 (line 1): ")
    assert "trained | No.<|end|>" in rejected
    assert "train: 2 rows" in counts
