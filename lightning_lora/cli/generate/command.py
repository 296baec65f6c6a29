"""The command from its arguments to the last line that it prints."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lightning_lora.cli.generate.answer_file import answer_line
from lightning_lora.cli.generate.answers import Answer, answer_tokens, encode_prompts
from lightning_lora.cli.generate.chat import chat
from lightning_lora.cli.generate.decoding import Sampling
from lightning_lora.cli.generate.loading import Loaded, choose_loading, load
from lightning_lora.cli.generate.prompts import read_prompts, with_system
from lightning_lora.cli.generate.run_settings import RunSettings, read_run_settings
from lightning_lora.cli.generate.source import find
from lightning_lora.cli.generate.view import show, terminal
from lightning_lora.cli.mistakes.writing import writing
from lightning_lora.data.prompts.read_prompts import Prompt, text_prompt
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import GenerateError, check_count
from lightning_lora.files.atomic import atomic_file

SHOWN = 3
"""Answers that are printed if all of them go into a file, and rows of the validation file that are asked by default."""
_NOT_SAMPLING = ("eos_token_id", "bos_token_id", "pad_token_id", "use_cache", "transformers_version")
"""Entries of a ``generation_config`` that do not decide how tokens are chosen."""


def run_generate(arguments: Namespace) -> None:
    """Generate what the arguments of ``lightning-lora generate`` ask for.

    Everything that can be wrong with them is found before the model is loaded.

    Raises:
        ConfigError: If the arguments contradict each other, or a value is out of its range.
        DataError: If a prompt cannot be read.
        AdapterFileError: If there is no model to generate with.
    """
    _check_chat(arguments)
    sampling = _sampling(arguments)
    how = choose_loading(arguments.device, arguments.dtype, arguments.base, arguments.allow_other_base)
    source = find(arguments.run, arguments.which)
    run = read_run_settings(source.path)
    rows = _row_settings(arguments, run.rows)
    prompts = [] if arguments.chat else _prompts(arguments, run, rows)
    with ExitStack() as stack:
        asked = arguments.prompts or run.validation or []
        file = _open(arguments.out, stack, asked) if arguments.out else None
        loaded = load(source, how, run.tokenizer, arguments.compare)
        _note(f"{loaded.origin}, {how.dtype} on {how.device}")
        _note(f"{sampling}{_unused(loaded)}")
        if arguments.chat:
            chat(loaded, rows, sampling, arguments.system, arguments.compare)
            return
        with _memory_advice(how.device):
            _answer_all(loaded, prompts, rows, sampling, arguments.compare, file)
    if arguments.out:
        _note(f"{len(prompts)} {'answer' if len(prompts) == 1 else 'answers'} written to {arguments.out}")


def _answer_all(
    loaded: Loaded, prompts: list[Prompt], rows: RowSettings, sampling: Sampling, compare: bool, file: BinaryIO | None
) -> None:
    console = terminal()
    for number, (prompt, tuned, base) in enumerate(_answers(loaded, prompts, rows, sampling, compare), start=1):
        if file:
            file.write(answer_line(prompt, tuned, base))
        if not file or number <= SHOWN:
            show(console, number, prompt, tuned, base)


def _answers(
    loaded: Loaded, prompts: list[Prompt], rows: RowSettings, sampling: Sampling, compare: bool
) -> Iterator[tuple[Prompt, Answer, Answer | None]]:
    """The answer of the trained model to each prompt, and that of its base to compare, batch after batch."""
    ids = encode_prompts(loaded.model, loaded.tokenizer, [prompt.record for prompt in prompts], rows)
    for start in range(0, len(prompts), sampling.batch_size):
        batch = slice(start, start + sampling.batch_size)
        # Another seed for each batch: equal prompts shall not get equal draws.
        drawn = dataclasses.replace(sampling, seed=sampling.seed + start)
        tuned: list[Answer] = answer_tokens(loaded.model, loaded.tokenizer, ids[batch], rows, drawn)
        base: list[Answer | None] = [None] * len(tuned)
        if compare:
            with loaded.base() as model:
                base = [*answer_tokens(model, loaded.tokenizer, ids[batch], rows, drawn)]
        yield from zip(prompts[batch], tuned, base, strict=True)


def _sampling(arguments: Namespace) -> Sampling:
    given = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(Sampling)}
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def _row_settings(arguments: Namespace, rows: RowSettings) -> RowSettings:
    given: dict[str, Any] = {}
    if arguments.chat_template is not None:
        given["chat_template"] = arguments.chat_template
    if arguments.chat_template_kwargs is not None:
        try:
            variables = json.loads(arguments.chat_template_kwargs)
        except (ValueError, RecursionError) as error:
            raise GenerateError(f"--chat_template_kwargs is not JSON: {error}") from error
        if not isinstance(variables, dict):
            raise GenerateError(
                f"--chat_template_kwargs must be a JSON object, as '{{\"enable_thinking\": false}}', got {variables!r}."
            )
        given["chat_template_kwargs"] = {**rows.chat_template_kwargs, **variables}
    return dataclasses.replace(rows, **given)


def _prompts(arguments: Namespace, run: RunSettings, rows: RowSettings) -> list[Prompt]:
    check_count("--limit", arguments.limit, GenerateError, optional=True)
    if arguments.limit and arguments.prompt and arguments.prompts is None:
        raise GenerateError("--limit counts the rows of a file, and --prompt is no file: leave out --limit.")
    found = [text_prompt(text, f"--prompt {number}") for number, text in enumerate(arguments.prompt or (), start=1)]
    if arguments.prompts is not None:
        found += read_prompts(arguments.prompts, rows, arguments.limit)
    if not found:
        if run.validation is None:
            raise GenerateError("nothing to ask: give --prompt TEXT, --prompts FILE, or --chat.")
        limit = arguments.limit or SHOWN
        found = read_prompts(run.validation, rows, limit)
        _note(f"prompts: the first {len(found)} rows of {run.validation}, which {run.config} names for validation")
    return found if arguments.system is None else [with_system(prompt, arguments.system) for prompt in found]


def _check_chat(arguments: Namespace) -> None:
    others = [name for name in ("prompt", "prompts", "out", "limit") if getattr(arguments, name) is not None]
    if arguments.chat and others:
        raise GenerateError(f"--chat asks for your messages as it goes: leave out --{' and --'.join(others)}.")


def _open(path: Path, stack: ExitStack, names: str | list[str]) -> BinaryIO:
    """Open the file of the answers, which appears when ``stack`` is left without an error; ``names`` are asked."""
    names = [names] if isinstance(names, str) else names
    if path.is_dir():
        raise GenerateError(f"--out {path} is a folder: name a file in it, such as {path / 'answers.jsonl'}.")
    asked = [Path(file) for name in names for file in glob(os.path.expanduser(name), recursive=True)]
    if path.exists() and any(path.samefile(file) for file in asked):
        raise GenerateError(f"--out {path} is the file of the prompts: name another one.")
    with writing(f"--out {path}", GenerateError):
        return stack.enter_context(atomic_file(path))


@contextmanager
def _memory_advice(device: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GenerateError(
            f"the answers do not fit in the memory of {device}: give a smaller --batch_size or --max_new_tokens."
        ) from error


def _unused(loaded: Loaded) -> str:
    """What the model's own ``generation_config`` would have set."""
    own: Any = loaded.model.generation_config
    settings = {
        name: value
        for name, value in own.to_diff_dict().items()
        if not name.startswith(("_", "output_")) and name not in _NOT_SAMPLING and value not in (None, False)
    }
    listed = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"; not used of the model's generation_config.json: {listed}" if listed else ""


def _note(text: str) -> None:
    """Print what is no answer beside the output, so that a pipe holds answers only."""
    print(text, file=sys.stderr)
