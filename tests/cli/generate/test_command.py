"""The command from outside: what it asks, what it prints and writes, and what it answers to bad input."""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import stat
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lora.cli import main as cli
from lightning_lora.cli.commands import COMMANDS
from lightning_lora.cli.embedded import MODEL, VALIDATION
from lightning_lora.cli.generate.run_settings import read_run_settings
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import ConfigError
from tests.cli.generate.runs import SHORT
from tests.support import toys, warm
from tests.support.commands import COMMAND


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def call(*arguments: object) -> int:
    return cli.main(["generate", *SHORT, *map(str, arguments)])


@pytest.mark.slow
def test_without_prompts_the_first_rows_of_the_runs_validation_file_are_asked(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(run_folder, "--compare", "--out", tmp_path / "out.jsonl") == 0
    asked = [json.loads(line) for line in VALIDATION.read_text().splitlines()[:3]]
    written = lines(tmp_path / "out.jsonl")
    assert [line["messages"] for line in written] == [[{"role": "user", "content": row["question"]}] for row in asked]
    assert [line["reference"] for line in written] == [row["answer"] for row in asked]
    keys = ["messages", "answer", "stop", "tokens", "base_answer", "base_stop", "base_tokens", "reference"]
    assert [list(line) for line in written] == [keys] * 3
    assert all(0 < line["tokens"] <= 8 for line in written)
    printed = capsys.readouterr()
    assert f"prompts: the first 3 rows of {VALIDATION}" in printed.err
    assert "3 answers written to" in printed.err
    for line in written:
        assert line["answer"].split()[0] in printed.out


def test_answers_go_to_the_output_and_all_else_beside_it(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(adapter, "--prompt", "What is 2 + 3?") == 0
    printed = capsys.readouterr()
    assert "What is 2 + 3?" in printed.out
    assert "base" not in printed.out
    assert f"{adapter} on {MODEL}, float32 on cpu" in printed.err
    assert "greedy (temperature 0), at most 8 tokens" in printed.err


def test_what_the_models_own_settings_would_have_done_is_told(
    tmp_path: Path, base: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    more = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(config | more))
    assert call(tmp_path, "--prompt=Hi") == 0
    printed = capsys.readouterr().err
    assert "not used of the model's generation_config.json: " in printed
    for words in ("do_sample True", "temperature 0.6", "repetition_penalty 1.1"):
        assert words in printed
    assert call(tmp_path, "--prompt=Hi", "--temperature=0.5", "--top_p=0.9", "--seed=3") == 0
    assert "temperature 0.5, top_p 0.9, top_k off, seed 3, at most 8 tokens" in capsys.readouterr().err


def test_prompts_of_a_file_come_in_order_with_a_limit_and_a_system_message(adapter: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {number}"} for number in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "new" / "out.jsonl"
    assert call(adapter, "--prompts", tmp_path / "prompts.jsonl", "--limit=10", "--batch_size=4", "--out", out) == 0
    assert [line["messages"][0]["content"] for line in lines(out)] == [f"say {number}" for number in range(10)]
    assert call(adapter, "--prompt=a", "--prompt=b", "--system=be brief", "--out", out) == 0
    system = {"role": "system", "content": "be brief"}
    assert [line["messages"][0] for line in lines(out)] == [system, system]


def test_a_text_is_continued(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"text": "Natalia sold"}))
    assert call(adapter, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out.jsonl") == 0
    (line,) = lines(tmp_path / "out.jsonl")
    assert (line["prompt"], "messages" in line) == ("Natalia sold", False)


def write_config(folder: Path, **init_args: Any) -> Path:
    data = {"class_path": "lightning_lora.data.SFTDataModule", "init_args": init_args}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {}, "data": data}))
    return folder / "config.yaml"


def test_rows_are_read_and_rendered_as_in_the_run(tmp_path: Path) -> None:
    file = write_config(
        tmp_path, train="t", validation=["v"], max_length=77, chat_template="x{{ a }}", chat_template_kwargs={"a": 1},
        columns={"frage": "question"}, prompt_separator=" => ", tokenizer="some/where", batch_size=3, packing=True,
    )  # fmt: skip
    deep = tmp_path / "adapters" / "last"
    deep.mkdir(parents=True)
    run = read_run_settings(deep)
    expected = RowSettings(77, {"frage": "question"}, "answers", "x{{ a }}", {"a": 1}, None, " => ")
    assert (run.rows, run.validation, run.tokenizer, run.config) == (expected, ["v"], "some/where", file)


@pytest.mark.parametrize(
    "config", ["", "data: null", "- a list", "data: {class_path: mine.Data, init_args: {max_length: 3}}"]
)
def test_a_config_of_other_data_changes_nothing(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config)
    assert read_run_settings(tmp_path / "x.ckpt").rows == RowSettings(1024)


def test_a_damaged_config_is_named_and_nothing_in_it_is_built(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("!!python/object/apply:os.system ['exit 1']")
    with pytest.raises(ConfigError, match=r"config.yaml cannot be read"):
        read_run_settings(tmp_path)
    write_config(tmp_path, train_on="everything")
    with pytest.raises(ConfigError, match=r"config.yaml: the settings of the data cannot be used: train_on"):
        read_run_settings(tmp_path)


def test_the_template_of_the_run_can_be_replaced(run_folder: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    template = "{{ greeting }} {{ messages[0].content }}{% if add_generation_prompt %} A:{% endif %}"
    (tmp_path / "template.jinja").write_text(template)
    assert call(run_folder, "--prompt=What is 2 + 3?", "--out", out) == 0
    options = ["--chat_template", tmp_path / "template.jinja", "--chat_template_kwargs", '{"greeting": "Good day!"}']
    assert call(run_folder, "--prompt=What is 2 + 3?", *options, "--out", other) == 0
    assert lines(out)[0]["answer"] != lines(other)[0]["answer"]


def test_the_template_of_the_run_is_used(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    shutil.copytree(adapter, tmp_path / "adapters" / "last")
    answers = []
    for settings in (
        {},
        {"chat_template": "{{ word }} {{ messages[0].content }}", "chat_template_kwargs": {"word": "A"}},
    ):
        write_config(tmp_path, **settings)
        assert call(tmp_path, "--prompt=What is 2 + 3?", "--out", out) == 0
        answers.append(lines(out)[0]["answer"])
    assert answers[0] != answers[1]


BAD: dict[str, tuple[list[str], str]] = {
    "nothing to ask": ([], "nothing to ask: give --prompt TEXT, --prompts FILE, or --chat"),
    "an empty prompt": (["--prompt= "], "--prompt 1 is empty"),
    "no such file": (["--prompts=./nowhere.jsonl"], "'./nowhere.jsonl' does not exist"),
    "an unknown kind of file": (["--prompts={here}/x.docx"], "is of an unknown kind"),
    "an unreadable row": (["--prompts={here}/bad.jsonl"], "bad.jsonl, line 1"),
    "no rows": (["--prompt=a", "--limit=0"], "--limit must be a whole number of 1 or more"),
    "sampling": (["--prompt=a", "--top_p=0.5"], "temperature 0 draws none"),
    "a device": (["--prompt=a", "--device=gpu"], "--device 'gpu' cannot be used on this machine"),
    "a type": (["--prompt=a", "--dtype=bf16"], "--dtype must be one of float32, bfloat16, float16, got 'bf16'"),
    "variables": (["--prompt=a", "--chat_template_kwargs=[1]"], "--chat_template_kwargs must be a JSON object"),
    "no JSON": (["--prompt=a", "--chat_template_kwargs={{a"], "--chat_template_kwargs is not JSON"),
    "a template": (["--prompt=a", "--chat_template=chatml"], "chat_template 'chatml' is not a file"),
    "a refusal": (["--prompt=a", "--chat_template={{{{ raise_exception('no!') }}}}"], "--prompt 1: the chat template"),
    "a folder to write": (["--prompt=a", "--out={here}"], "is a folder: name a file in it"),
    "a folder as file": (["--prompt=a", "--out={here}/bad.jsonl/out"], "cannot be written"),
    "half a character": (["--prompt=\udce9"], "--prompt 1: 'prompt' has half a character"),
    "half a character of a stop": (["--prompt=a", "--stop=\udce9"], "stop holds half a character"),
    "half a character of a template": (["--prompt=a", "--chat_template={{{{ '\udce9' }}}}"], "writes half a character"),
    "a column of another type": (["--prompts={here}/number.jsonl"], "row 0 (line 1): 'prompt' must be text, got 5"),
    "a limit of no file": (["--prompt=a", "--limit=1"], "--limit counts the rows of a file"),
    "a temperature near 0": (["--prompt=a", "--temperature=1e-320"], "temperature 1e-320 is too low to divide by"),
    "a seed beyond 64 bits": (["--prompt=a", f"--seed={2**64}"], "seed must be below 2**63"),
    "a device without values": (["--prompt=a", "--device=meta"], "--device 'meta' holds shapes and no values"),
    "a pipe to write": (["--prompt=a", "--out={here}/pipe"], "pipe is a device or a pipe: name a file"),
    "its own prompts": (["--prompts={here}/*.txt", "--out={here}/own.txt"], "own.txt is the file of the prompts"),
    "chat and prompts": (["--prompt=a", "--chat"], "--chat asks for your messages as it goes: leave out --prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    name: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, words = BAD[name]
    here = tmp_path / "here"
    here.mkdir()
    (here / "x.docx").touch()
    (here / "bad.jsonl").write_text("{]")
    (here / "number.jsonl").write_text('{"prompt": 5}')
    (here / "own.txt").write_text("Hi")
    os.mkfifo(here / "pipe")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    (out := tmp_path / "out.jsonl").write_text("as it was")
    chosen = [option.format(here=here) for option in options]
    where = [] if any("--out" in option or option == "--chat" for option in options) else ["--out", out]
    assert call(adapter, *chosen, *where) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("error: ") == 1
    assert printed.out == ""
    assert out.read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([*before, "out.jsonl"])
    assert ((here / "own.txt").read_text(), stat.S_ISFIFO((here / "pipe").stat().st_mode)) == ("Hi", True)


CHANGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "other sizes": ("config.json", {"hidden_size": 320}, "have other shapes than its config.json says"),
    "no token ids": ("generation_config.json", {"eos_token_id": "x"}, "must hold token ids, got ['x']"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHANGED)
def test_a_damaged_model_folder_is_one_error(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, change, words = CHANGED[name]
    folder = shutil.copytree(MODEL, tmp_path / "model")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    assert call(folder, "--prompt=Hi") == 2
    assert words in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(
    base: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = copy.deepcopy(base)
    small.resize_token_embeddings(100)
    small.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert call(tmp_path, "--prompt=a question of many words") == 2
    assert "is beyond the 100 that the model knows" in capsys.readouterr().err


def test_answers_are_shown_on_a_terminal_that_knows_no_width(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    assert call(adapter, "--prompt=What is 2 + 3?") == 0
    assert "What is 2 + 3?" in capsys.readouterr().out


def test_a_prompt_that_is_too_long_is_found_before_any_answer(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("Hi\n" * 9 + "word " * 2000)
    assert call(adapter, "--prompts", tmp_path / "p.txt", "--batch_size=1") == 2
    printed = capsys.readouterr()
    assert "p.txt, line 10: the prompt has" in printed.err
    assert printed.out == ""


def test_commands_in_the_documentation_are_understood() -> None:
    page = (toys.ROOT / "docs" / "use" / "generate.md").read_text()
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("lightning-lora generate")]
    parser = ArgumentParser(exit_on_error=False)
    COMMANDS["generate"].configure(parser)
    assert len(commands) >= 5
    for command in commands:
        assert parser.parse_args(command[2:]).run == Path("runs/sft/version_0")


def test_a_process_says_nothing_but_its_notes(adapter: Path, tmp_path: Path) -> None:
    done = warm.run(*COMMAND, "generate", adapter, "--prompt=Hi", "--compare", *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 2, done.stderr
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
