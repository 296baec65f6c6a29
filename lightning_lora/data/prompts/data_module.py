"""The data module for reinforcement learning: prompts, and what a reward needs beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler, Sampler
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_lora.data.bad_rows import ACTIONS, BadRows, RowError, plural_rows, refuse
from lightning_lora.data.prompts.prompt_tokens import prompt_ids
from lightning_lora.data.prompts.read_prompts import Prompt, prompt_rows
from lightning_lora.data.records import Conversation, Message, Text
from lightning_lora.data.sampling.each_once import each_once
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.splits_module import SplitsDataModule, scrambled
from lightning_lora.data.tokenizer import find_context, find_tokenizer
from lightning_lora.errors import DataError, DataSettingError, check_arguments, check_choice, check_count

_ARGUMENTS = ("prompts", "completions")
"""Columns that a reward cannot be given: they are its own arguments."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt as tokens, and as a reward sees it.

    Args:
        input_ids: Its tokens.
        prompt: A text, or messages where it is more than one question.
        columns: The other columns of its row.
        place: File and row.
        weight: 0 for a row that must not count.
    """

    input_ids: list[int]
    prompt: str | list[Message]
    columns: dict[str, Any]
    place: str
    weight: float = 1.0


class PromptDataModule(SplitsDataModule):
    """Prompts for reinforcement learning: files or hub datasets to batches of prompts without answers.

    Sources, formats and chat templates are those of `SFTDataModule`, so that a prompt is the very tokens that stood
    before an answer there. A row is a ``prompt`` (a text or messages), ``messages`` whose last turn is the user's, a
    ``question`` as in GSM8K, or a row of any other format of supervised data, up to its last answer. Every line of a
    ``.txt`` file is a prompt.

    Batches are mappings with ``input_ids`` (a list of tokens ``(length,)``, not padded), ``prompts`` (a list of texts
    or of messages, as a reward sees them) and ``columns`` (the other columns of the rows by name, each a list, None
    where a row has none), such as the ``answer`` of GSM8K.

    The order of the training prompts depends on ``seed`` and the epoch only, not on the number of devices or on other
    random draws.

    Args:
        train: Training prompts: files, globs or hub names. None if only validating or testing.
        validation: Prompts whose rewards are measured. None skips validation.
        test: Prompts for ``test`` and ``predict``.
        batch_size: Prompts in a batch on each device.
        max_prompt_length: Tokens of a prompt at most. None allows all that leave room in the context of the model.
        on_long_prompt: What to do if prompts are longer: ``"error"`` stops, ``"skip"`` leaves them out with a warning.
        tokenizer: A folder, a hub name or a tokenizer. None takes the tokenizer of the model that is trained.
        seed: Seeds the order of the training prompts; an integer of at least 0.
        max_rows: Use only this many rows of ``train``, from the first. None uses all.
        validation_rows: Use only this many rows of ``validation``, from the first. None uses all.
        columns: A file's own names of columns and of keys of messages, to known ones: ``{"frage": "question"}``.
        chat_template: The chat template: its name in the tokenizer, a file, or the template itself. None takes the
            tokenizer's default.
        chat_template_kwargs: Variables for the chat template, such as ``enable_thinking``.
        end_of_answer: Text of a token that ends an answer if the chat template ends it with none.
        prompt_separator: Text between prompt and answer for a tokenizer without a chat template.
        on_bad_row: What to do if rows cannot be used: ``"error"`` stops with one error about all of them, ``"skip"``
            leaves them out with a warning.

    Attributes:
        rows: The prompts of each split that was set up, lists of `PromptRow` by name of the split.

    Raises:
        ConfigError: If a setting is out of its range. In ``setup``: if there is no tokenizer, or no data for the stage.
        DataError: In ``setup``: if a file or a row cannot be used.
    """

    kind = "prompts"

    def __init__(
        self,
        train: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        batch_size: int = 8,
        max_prompt_length: int | None = None,
        on_long_prompt: str = "error",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        max_rows: int | None = None,
        validation_rows: int | None = None,
        columns: dict[str, str] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        end_of_answer: str | None = None,
        prompt_separator: str = "\n",
        on_bad_row: str = "error",
    ) -> None:
        super().__init__(
            {"train": train, "validation": validation, "test": test},
            {"train": max_rows, "validation": validation_rows, "test": None},
            tokenizer,
            seed,
            on_bad_row,
            batch_size,
        )
        check_arguments(PromptDataModule, locals(), DataSettingError)
        self._tell_unused(PromptDataModule, locals(), "max_rows")
        check_count("max_prompt_length", max_prompt_length, DataSettingError, optional=True)
        check_choice("on_long_prompt", on_long_prompt, ACTIONS, DataSettingError)
        self.settings = RowSettings(
            max_prompt_length or 1,  # no row is cut
            columns or {},
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs or {},
            end_of_answer=end_of_answer,
            prompt_separator=prompt_separator,
        )
        self.max_prompt_length, self.on_long_prompt = max_prompt_length, on_long_prompt

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the prompts, and check them against the model; None sets up all splits that were given."""
        tokenizer = find_tokenizer(self.tokenizer, self._module())
        context, whose = find_context(tokenizer, self._module())
        for split in self._splits(stage):
            rows = self._read(split, tokenizer)
            rows = self._short(split, rows, context, whose)
            _tell_duplicates(split, rows)
            self.rows[split] = rows

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Training prompts in an order given by ``seed`` and epoch, of which each device gets its share."""
        sampler = DistributedSampler(self._loaded("train"), *self._share(), seed=scrambled(self.seed))
        return self._loader("train", self.rows["train"], sampler)

    @override
    def _in_file_order(self, split: str, num_devices: int = 1, device: int = 0) -> DataLoader[dict[str, Any]]:
        rows = self._loaded(split)
        return self._loader(split, *each_once(rows, num_devices, device), weighted=len(rows) % num_devices > 0)

    def _loader(
        self, split: str, rows: Any, sampler: Sampler[Any], weighted: bool = False
    ) -> DataLoader[dict[str, Any]]:
        names = list(dict.fromkeys(name for row in self.rows[split] for name in row.columns))
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=_Collate(names, weighted),
            generator=torch.Generator().manual_seed(self.seed),  # or the loader draws from the global one
        )

    def _read(self, split: str, tokenizer: PreTrainedTokenizerBase) -> list[PromptRow]:
        rows: list[PromptRow] = []
        names: Any = self.sources[split]
        bad = BadRows(names if isinstance(names, str) else ", ".join(names))
        for found in islice(prompt_rows(names, self.settings, split), self.limits[split]):
            bad.rows += 1
            row = found if isinstance(found, RowError) else _prompt_row(tokenizer, found, self.settings)
            if isinstance(row, RowError):
                bad.add(row)
            else:
                rows.append(row)
        refuse([bad], self.on_bad_row)
        if bad.count:
            rank_zero_warn(f"{split}: left out: {bad}")
        return rows

    def _short(self, split: str, rows: list[PromptRow], context: int | None, whose: str) -> list[PromptRow]:
        """The rows that are not longer than allowed."""
        limit, why = self.max_prompt_length, "max_prompt_length"
        if context is not None and (limit is None or context <= limit):
            limit, why = context - 1, f"the context of {whose} ({context}), less one for an answer"
        long = [row for row in rows if limit is not None and len(row.input_ids) > limit]
        if not long:
            return rows
        longest = max(long, key=lambda row: len(row.input_ids))
        told = (
            f"{split}: {len(long):,} of {plural_rows(len(rows))} have prompts of more than {limit} tokens, which is "
            f"{why}; the longest has {len(longest.input_ids)} ({longest.place})."
        )
        if self.on_long_prompt == "error" or len(long) == len(rows):
            raise DataError(f"{told} Shorten them, or leave them out with on_long_prompt: skip.")
        rank_zero_warn(f"{told} They are left out.")
        return [row for row in rows if len(row.input_ids) <= (limit or 0)]


class _Collate:
    """Makes a batch of rows.

    Args:
        names: Names of all columns that a row of the split has.
        weighted: Whether rows have a ``weight``.
    """

    def __init__(self, names: Sequence[str], weighted: bool) -> None:
        self.names = names
        self.weighted = weighted

    def __call__(self, rows: Sequence[PromptRow]) -> dict[str, Any]:
        weights = {"weights": torch.tensor([row.weight for row in rows])} if self.weighted else {}
        return weights | {
            "input_ids": [torch.tensor(row.input_ids) for row in rows],
            "prompts": [row.prompt for row in rows],
            "columns": {name: [row.columns.get(name) for row in rows] for name in self.names},
        }


def _prompt_row(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, settings: RowSettings) -> PromptRow | RowError:
    record, columns = prompt.record, dict(prompt.columns)
    if prompt.reference is not None and prompt.reference not in columns.values():
        # The last turn of messages is the answer, which is in no column of its own.
        columns.setdefault("answer", prompt.reference)
    clash = [name for name in _ARGUMENTS if name in columns]
    if clash:
        return RowError(record.place, f"the column {clash[0]!r} has the name of an argument of a reward: rename it.")
    try:
        (ids,) = prompt_ids(tokenizer, [record], settings)
    except RowError as error:
        return error
    if not ids:
        return RowError(record.place, "the prompt has no tokens.")
    return PromptRow(ids, _as_seen(record), columns, record.place)


def _as_seen(record: Conversation | Text) -> str | list[Message]:
    """A text, or messages where they are more than a question."""
    if isinstance(record, Text):
        return record.text
    (first, *others) = record.messages
    is_question = not others and first["role"] == "user" and isinstance(first.get("content"), str)
    return first["content"] if is_question else record.messages


def _tell_duplicates(split: str, rows: Sequence[PromptRow]) -> None:
    counts = Counter(tuple(row.input_ids) for row in rows)
    repeated = len(rows) - len(counts)
    if repeated:
        most = max(counts.values())
        rank_zero_info(
            f"{split}: {repeated:,} of {plural_rows(len(rows))} repeat the prompt of an earlier row "
            f"(one occurs {most} times)"
        )
