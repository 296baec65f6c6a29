"""The part of a data module that does not know what batches are made of: sources to rows of tokens, and loaders."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_lora.data.read_splits import check_columns, read_splits, source_names
from lightning_lora.data.sampling.each_once import each_once
from lightning_lora.data.sampling.hold_out import hold_out, tell_shared
from lightning_lora.data.sampling.mixture import read_shares
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.source_report import SourceReport
from lightning_lora.data.sources import find_sources
from lightning_lora.data.split import SplitStatistics, check_context, check_ids, column, keep_supervised
from lightning_lora.data.splits_module import Sources, SplitsDataModule, scrambled
from lightning_lora.data.streaming import TokenStream
from lightning_lora.data.tokenizer import find_context, find_tokenizer, pad_id
from lightning_lora.errors import DataSettingError, check_count


class RowsDataModule(SplitsDataModule):
    """Reads the rows of each split as tokens, checks them against the model and counts them.

    A subclass makes batches of ``rows``: by `_examples` and `_collator` for the splits in the order of the files, and
    by ``train_dataloader``.

    Args:
        sources: The sources of ``train``, ``validation`` and ``test``; None for a split without rows. The sources of
            ``train`` may be a mapping from names to shares.
        settings: How rows become tokens.
        tokenizer: A folder, a hub name or a tokenizer. None takes the tokenizer of the model that is trained.
        seed: Decides which conversations are held out.
        limits: Most conversations of each split; None takes all.
        validation_share: Share of the conversations of ``train`` that is held out for validation. None holds out none.
        beyond_context: Allow rows longer than the model's context.
        on_bad_row: ``"error"`` stops if rows cannot be used, ``"skip"`` leaves them out.
        num_proc: Processes that tokenise.
        streaming: Whether the rows of ``train`` are read and tokenised while training.
        batch_size: Rows in a batch on each device.
        num_workers: Processes that make batches.

    Attributes:
        stream: The training rows after ``setup`` if they are streamed.

    Raises:
        ConfigError: If a setting is out of its range or contradicts another one.
    """

    def __init__(
        self,
        sources: dict[str, Sources],
        settings: RowSettings,
        tokenizer: str | PreTrainedTokenizerBase | None,
        seed: int,
        limits: dict[str, int | None],
        validation_share: float | None,
        beyond_context: bool,
        on_bad_row: str = "error",
        num_proc: int = 1,
        streaming: bool = False,
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        for name, count in {"max_length": settings.max_length, "num_proc": num_proc}.items():
            check_count(name, count, DataSettingError)
        check_count("num_workers", num_workers, DataSettingError, least=0)
        for name, value in {"beyond_context": beyond_context, "streaming": streaming}.items():
            if not isinstance(value, bool):  # a text would be true, "no" too
                raise DataSettingError(f"{name} must be true or false, got {value!r}.")
        self.shares = read_shares(sources["train"])
        for split in ("validation", "test"):
            if isinstance(sources[split], Mapping):
                raise DataSettingError(f"{split} takes names without shares: all of its rows are used, once.")
        if validation_share is not None:
            _check_validation_share(validation_share, sources)
        if streaming and (self.shares or validation_share is not None):
            what = "shares of sources" if self.shares else "validation_share"
            raise DataSettingError(f"streaming never has all rows, which {what} needs: give one of them.")
        self.settings = settings
        self.validation_share = validation_share
        self.beyond_context = beyond_context
        self.num_proc = num_proc
        self.streaming = streaming
        self.num_workers = num_workers
        self.stream: TokenStream | None = None
        self.statistics: dict[str, SplitStatistics] = {}
        self._pad_id = 0
        super().__init__(sources, limits, tokenizer, seed, on_bad_row, batch_size)

    @property
    def max_length(self) -> int:
        """Tokens kept of each row."""
        return self.settings.max_length

    @override
    def prepare_data(self) -> None:
        """Read and tokenise the data into the cache; runs in one process per node."""
        self._read(self._splits(self.trainer.state.fn if self.trainer else None), self._find_tokenizer())

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load the tokens, check them against the model and count them; None sets up all splits that were given."""
        tokenizer, module = self._find_tokenizer(), self._module()
        size = getattr(module, "vocab_size", None)
        vocab_size = size if isinstance(size, int) else None
        self._pad_id = pad_id(tokenizer, vocab_size)
        context, whose = (None, "") if self.beyond_context else find_context(tokenizer, module)
        splits = self._splits(stage)
        if self.streaming and "train" in splits:
            sources = find_sources(source_names(self.sources["train"]), "train")
            how = (self.limits["train"], self.seed, self.on_bad_row, self.num_proc, vocab_size, context, whose)
            self.stream = TokenStream(sources, tokenizer, self.settings, *how)
            self.stream.check()
            splits.remove("train")
        for split, rows in self._tables(splits, tokenizer).items():
            if vocab_size is not None:
                check_ids(rows, vocab_size)
            check_context(rows, split, self.settings.max_length, context, whose)
            names = list(dict.fromkeys(source_names(self.sources[self._read_from(split)])))
            self.rows[split], self.statistics[split] = keep_supervised(rows, split, self.settings.max_length, names)
        if "train" in self.rows and "validation" in self.rows:
            tell_shared(self.rows["train"], self.rows["validation"])
        if self.num_workers:
            # Workers only read tokens. Without this, tokenizers before 0.23 warn at every fork.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def first_rows(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """The names and tokens of the first ``count`` training rows."""
        rows = self.rows["train"]
        return [(f"row {number + 1}", rows[number]) for number in range(min(count, len(rows)))]

    def _examples(self, split: str) -> Any:
        """What a loader takes its examples from."""
        raise NotImplementedError

    def _collator(self, split: str, weighted: bool) -> Callable[[Any], dict[str, Tensor]]:
        """What makes a batch of examples of a split in the order of the files, with weights or without."""
        raise NotImplementedError

    @override
    def _in_file_order(self, split: str, num_devices: int = 1, device: int = 0) -> DataLoader[dict[str, Tensor]]:
        rows = self._examples(split)
        weighted = self._is_weighted(split) or len(rows) % num_devices > 0
        return self._loader(*each_once(rows, num_devices, device), self._collator(split, weighted))

    def _loader(
        self, rows: Any, sampler: Sampler[Any], collate: Callable[[Any], dict[str, Tensor]]
    ) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(scrambled(self.seed)),  # or the loader draws from the global one
        )

    def _is_weighted(self, split: str) -> bool:
        if split == "train" and self.stream is not None:
            return True  # a later row may have a weight
        return bool((column(self._loaded(split), "weight") != 1).any())

    def _tables(self, splits: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
        tables, reports = self._read(splits, tokenizer)
        if not self.streaming:  # a stream checks its own rows, which may be the only ones with these names
            check_columns(reports, self.settings.columns, " and ".join(tables))
        for report in reports:
            report.tell()
        if self.validation_share is not None and "train" in tables:
            tables |= self._divided(tables["train"], self.validation_share)
        return {split: tables[split] for split in splits}

    def _divided(self, rows: Dataset, share: float) -> dict[str, Dataset]:
        """The rows of the training sources as two splits."""
        is_held = hold_out(rows, share, self.seed)
        conversations = column(rows, "conversation")
        held, total = numpy.unique(conversations[is_held]), len(numpy.unique(conversations))
        rank_zero_info(
            f"train: {len(held):,} of {total:,} conversations ({len(held) / total:.1%}) are held out for validation, "
            f"{total - len(held):,} are trained on"
        )
        last = held[: self.limits["validation"]][-1]
        return {
            "train": rows.select((~is_held).nonzero()[0]),
            "validation": rows.select((is_held & (conversations <= last)).nonzero()[0]),
        }

    def _read(
        self, splits: list[str], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[dict[str, Dataset], list[SourceReport]]:
        read_from = dict.fromkeys(map(self._read_from, splits))
        held = {split: self.sources[split] for split in read_from if not (self.streaming and split == "train")}
        return read_splits(held, tokenizer, self.settings, self.limits, self.shares, self.on_bad_row, self.num_proc)

    def _read_from(self, split: str) -> str:
        """The split whose sources hold the rows of a split."""
        return "train" if split == "validation" and self.validation_share is not None else split

    @override
    def _has(self, split: str) -> bool:
        return super()._has(self._read_from(split))

    def _find_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            return find_tokenizer(None, self._module())
        self.tokenizer = find_tokenizer(self.tokenizer, None)
        return self.tokenizer


def _check_validation_share(share: Any, sources: Mapping[str, Any]) -> None:
    if not isinstance(share, float) or not 0 < share < 1:
        raise DataSettingError(f"validation_share must be a number between 0 and 1, got {share!r}.")
    if sources["validation"] is not None:
        raise DataSettingError("validation_share takes rows from train, and validation has its own: give one of them.")
    if sources["train"] is None:
        raise DataSettingError("validation_share takes rows from train, which is not given.")
