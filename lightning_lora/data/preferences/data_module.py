"""The data module for pairs of answers of which one is preferred."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_lora.data.preferences.collate import CollatePairs, Pairs
from lightning_lora.data.rows_module import RowsDataModule
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.split import column
from lightning_lora.data.splits_module import scrambled
from lightning_lora.errors import DataSettingError, check_arguments


class PreferenceDataModule(RowsDataModule):
    """Data of preferences: files or hub datasets to batches of pairs, with a loss on the answers only.

    Sources, kinds of files, chat templates and what happens to long or bad rows are those of `SFTDataModule`. A row is
    a pair, in one of these shapes:

    - ``prompt`` (or ``question``), ``chosen``, ``rejected``: texts, or lists of messages;
    - ``chosen``, ``rejected``: two lists of messages that begin with the same turns;
    - ``chosen``, ``rejected``: two transcripts as those of HH-RLHF (two line breaks, then ``Human:`` or
      ``Assistant:``).

    Whatever both sides begin with is the prompt; the assistant's turns after it are the answer, and only these are
    trained on. Beside them a row may have ``system``, ``tools``, a ``weight``, and a ``margin``: by how much the chosen
    answer is better, which `RewardModel` reads. A pair with equal sides, without a prompt, or with an empty answer
    cannot be used. If the prompt alone fills ``max_length``, the pair is dropped, and a warning counts such rows.

    Batches have ``input_ids``, ``attention_mask`` and ``labels``, each ``(pairs, 2, tokens)`` with the chosen row of a
    pair first; ``weights`` ``(pairs,)`` if any pair of the split has a weight other than 1, and ``margin`` ``(pairs,)``
    if any has one.

    Args:
        train: Training pairs: a file, a glob, a hub name or a list of these. None if only validating or testing.
        validation: Pairs for the validation loss. None skips validation.
        test: Pairs for ``test`` and ``predict``.
        batch_size: Pairs in a batch on each device.
        max_length: Tokens kept of each side, from its beginning.
        tokenizer: A folder, a hub name or a tokenizer. None takes the tokenizer of the model that is trained.
        num_workers: Processes that make batches.
        seed: Seeds the order of the training pairs and the choice of ``validation_share``; an integer of at least 0.
        max_rows: Use only this many rows of ``train``, from the first. None uses all.
        validation_rows: Use only this many rows of ``validation``, from the first. None uses all.
        columns: A file's own names of columns and of keys of messages, to known ones: ``{"better": "chosen"}``.
        chat_template: The chat template: its name in the tokenizer, a file, or the template itself. None takes the
            tokenizer's default.
        chat_template_kwargs: Variables for the chat template, such as ``enable_thinking``.
        end_of_answer: Text of a token put after each answer if the chat template ends it with none. None adds none.
        prompt_separator: Text between prompt and answer for a tokenizer without a chat template.
        validation_share: Share of the pairs of ``train``, above 0 and below 1, that is held out for validation. None
            holds out none.
        beyond_context: Allow rows longer than the context of the model.
        on_bad_row: What to do if rows cannot be used: ``"error"`` stops with one error about all of them, ``"skip"``
            leaves them out with a warning.
        num_proc: Processes that tokenise.

    Attributes:
        statistics: Counts of each split that was set up, two rows for each pair.
        rows: Tokens of each split that was set up, two rows for each pair, the chosen one first.

    Raises:
        ConfigError: If a setting is out of its range. In ``setup``: if there is no tokenizer, no data for the stage, or
            a row is longer than the context of the model.
        DataError: In ``setup``: if a file or a row cannot be used.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        batch_size: int = 8,
        max_length: int = 1024,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        num_workers: int = 0,
        seed: int = 0,
        max_rows: int | None = None,
        validation_rows: int | None = None,
        columns: dict[str, str] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        end_of_answer: str | None = None,
        prompt_separator: str = "\n",
        validation_share: float | None = None,
        beyond_context: bool = False,
        on_bad_row: str = "error",
        num_proc: int = 1,
    ) -> None:
        if isinstance(train, Mapping):
            raise DataSettingError("train takes names without shares: all pairs are used, once in an epoch.")
        settings = RowSettings(
            max_length,
            columns or {},
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs or {},
            end_of_answer=end_of_answer,
            prompt_separator=prompt_separator,
            pairs=True,
        )
        super().__init__(
            {"train": train, "validation": validation, "test": test},
            settings,
            tokenizer,
            seed,
            {"train": max_rows, "validation": validation_rows, "test": None},
            validation_share,
            beyond_context,
            on_bad_row,
            num_proc,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        check_arguments(PreferenceDataModule, locals(), DataSettingError)
        self._tell_unused(PreferenceDataModule, locals(), "max_rows")

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Training pairs in an order given by ``seed`` and epoch, of which each device gets its share."""
        pairs = self._examples("train")
        sampler = DistributedSampler(pairs, *self._share(), seed=scrambled(self.seed))
        return self._loader(pairs, sampler, self._collator("train", self._is_weighted("train")))

    @override
    def first_rows(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """Both sides of the first ``count`` training pairs."""
        sides = super().first_rows(2 * count)
        names = (f"pair {number // 2 + 1}, {('chosen', 'rejected')[number % 2]}" for number in range(len(sides)))
        return [(name, row) for name, (_, row) in zip(names, sides, strict=True)]

    @override
    def _examples(self, split: str) -> Pairs:
        columns = ["input_ids", "supervised", "weight", "margin"]
        return Pairs(self._loaded(split).select_columns(columns).with_format("numpy"))

    @override
    def _collator(self, split: str, weighted: bool) -> Callable[[Any], dict[str, Tensor]]:
        return CollatePairs(self._pad_id, weighted, bool(column(self._loaded(split), "margin").any()))
