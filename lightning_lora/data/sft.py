"""The data module for supervised fine-tuning."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_lora.errors import ConfigError

from .bad_rows import check_action
from .bins import batched, even_rows
from .collate import Collate, CollateEvenly, CollatePacked
from .packing import PackedRows, PackSampler
from .settings import RowSettings
from .source_report import SourceReport
from .sources import find_sources
from .split import SplitStatistics, check_columns, check_ids, keep_supervised, read_splits, row_lengths
from .streaming import Drawn, StreamSampler, TokenStream
from .tokenizer import find_tokenizer, pad_id

_STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("test",)}
"""The splits of each stage; the first one is required."""


class SFTDataModule(LightningDataModule):
    """Data for supervised fine-tuning: files or hub datasets to batches with a loss on the answers only.

    Each of ``train``, ``validation`` and ``test`` is a file, a glob, a hub name, or a list of these. Files are
    ``.json`` (a list of objects, or one object per line), ``.jsonl`` and ``.csv``, each also with ``.gz``, and
    ``.parquet``. A name that is not on disk and does not look like a path is a hub name: ``name``, ``owner/name``,
    ``owner/name:split`` or ``owner/name:config:split``.

    The columns decide how rows are read; the first format that fits is used: ``messages`` (role, content),
    ``conversations`` (from, value), ``instruction`` with optional ``input`` and ``output`` or ``response``, ``prompt``
    and ``completion``, ``question`` and ``answer``, ``text``. Beside these a row may have a system prompt, tools,
    documents, options, history and a weight (docs/data.md). Conversations are rendered by the tokenizer's chat
    template. The loss is on every assistant turn and the token that ends it, or on all of a plain text.

    Batches have ``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, tokens)``; ``labels`` is -100 where
    there is no loss. With ``packing``, training batches have ``position_ids`` instead of ``attention_mask``, which
    start at 0 with each example; `CausalLM` refuses models in which packed examples would see each other. Rows for
    validation, test and prediction are never packed.

    Tokens are cached in ``HF_DATASETS_CACHE``. The order of the training rows depends on ``seed`` and the epoch only,
    not on the number of devices or on other random draws.

    Args:
        train: Training rows. None if only validating or testing.
        validation: Rows for the validation loss. None skips validation.
        test: Rows for ``test`` and ``predict``.
        batch_size: Rows in a batch on each device.
        max_length: Tokens kept of each row, from its beginning. A warning counts the rows that are cut and those left
            without a loss.
        tokenizer: A folder, a hub name or a tokenizer. None takes the tokenizer of the model that is trained.
        num_workers: Processes that make batches. 0 makes them in the main process, which is usually fast enough.
        seed: Seeds the order of the training rows; an integer of at least 0.
        max_rows: Use only this many rows of ``train``, from the first. None uses all.
        validation_rows: Use only this many rows of ``validation``, from the first. None uses all.
        packing: False pads each row to the longest one of its batch. True or ``"length"`` fills training rows with
            several examples up to ``max_length`` tokens; ``batch_size`` then counts the filled rows. ``"batch"`` packs
            the ``batch_size`` examples of each batch into fewer rows, so that optimizer steps stay as they are without
            packing.
        columns: A file's own names of columns and of keys of messages, to known ones: ``{"frage": "question"}``.
        train_on: ``"answers"`` trains on every answer of the assistant, ``"last answer"`` on the last one only.
        chat_template: The chat template: its name in the tokenizer, a file, or the template itself. None takes the
            tokenizer's default.
        chat_template_kwargs: Variables for the chat template, such as ``enable_thinking``. ``date`` (``YYYY-MM-DD``) is
            the day that a template writes as today.
        end_of_answer: Text of a token put after each answer if the chat template ends it with none. None adds none.
        prompt_separator: Text between prompt and answer for a tokenizer without a chat template.
        on_bad_row: What to do if rows cannot be used: ``"error"`` stops with one error about all of them, ``"skip"``
            leaves them out with a warning.
        num_proc: Processes that tokenise; the tokens are the same for any number.
        streaming: Whether to read and tokenise ``train`` while training, without downloading or caching it: for data
            larger than the disk. The order is then a shuffle among 10,000 rows at a time.

    Attributes:
        statistics: Counts of each split that was set up, a `SplitStatistics` by name of the split; not of a stream.
        rows: Tokens of each split that was set up and is no stream, a dataset by name of the split with the columns
            ``input_ids``, ``supervised`` and ``place`` (the origin of the row).

    Raises:
        ConfigError: If a number is out of its range. In ``setup``: if there is no tokenizer, or no data for the stage.
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
        packing: bool | str = False,
        columns: dict[str, str] | None = None,
        train_on: str = "answers",
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        end_of_answer: str | None = None,
        prompt_separator: str = "\n",
        on_bad_row: str = "error",
        num_proc: int = 1,
        streaming: bool = False,
    ) -> None:
        super().__init__()
        numbers = {"batch_size": (batch_size, 1), "max_length": (max_length, 1), "num_workers": (num_workers, 0)}
        numbers |= {
            "num_proc": (num_proc, 1),
            "seed": (seed, 0),
            "max_rows": (max_rows, 1),
            "validation_rows": (validation_rows, 1),
        }
        for name, (value, least) in numbers.items():
            optional = name.endswith("_rows") and value is None
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{name} must be a whole number of {least} or more, got {value!r}.")
        if not isinstance(packing, bool) and packing not in ("length", "batch"):
            raise ConfigError(f"packing must be true (or 'length'), 'batch' or false, got {packing!r}.")
        self.packing = "length" if packing is True else packing
        self.sources = {"train": train, "validation": validation, "test": test}
        self.batch_size = batch_size
        self.settings = RowSettings(
            max_length,
            columns or {},
            train_on,
            chat_template,
            chat_template_kwargs or {},
            end_of_answer,
            prompt_separator,
        )
        self.on_bad_row = check_action(on_bad_row)
        self.num_proc = num_proc
        if streaming and self.packing == "length":
            raise ConfigError("packing: true needs all rows at once, and streaming never has them: set packing: batch.")
        self.streaming = streaming
        self.tokenizer = tokenizer
        self.num_workers = num_workers
        self.seed = seed
        self.limits = {"train": max_rows, "validation": validation_rows, "test": None}
        self.statistics: dict[str, SplitStatistics] = {}
        self.rows: dict[str, Dataset] = {}
        self._pad_id = 0
        self._packed: PackedRows | None = None
        self._stream: TokenStream | None = None
        if validation is None:
            # Lightning then logs that validation is skipped, instead of warning about a loader of length zero.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    @override
    def prepare_data(self) -> None:
        """Read and tokenise the data into the cache; runs in one process per node."""
        self._read(self._splits(self.trainer.state.fn if self.trainer else None), self._find_tokenizer())

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load the tokens, check them against the model and count them; None sets up all splits that were given."""
        tokenizer = self._find_tokenizer()
        vocab_size = self._vocab_size()
        self._pad_id = pad_id(tokenizer, vocab_size)
        splits = self._splits(stage)
        if self.streaming and "train" in splits:
            sources = find_sources(self.sources["train"] or [], "train")
            how = (self.limits["train"], self.seed, self.on_bad_row, self.num_proc, vocab_size)
            self._stream = TokenStream(sources, tokenizer, self.settings, *how)
            self._stream.check()
        read, reports = self._read(splits, tokenizer)
        check_columns(reports, self.settings.columns)
        for report in reports:
            report.tell()
        for split, rows in read.items():
            if vocab_size is not None:
                check_ids(rows, vocab_size)
            self.rows[split], self.statistics[split] = keep_supervised(rows, split, self.settings.max_length)
            if split == "train" and self.packing:
                self._pack()
        if self.num_workers:
            # Workers only read tokens. Without this, tokenizers before 0.23 warn at every fork.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Training rows in an order given by ``seed`` and epoch, of which each device gets its share."""
        if self.streaming and self._stream is None:
            raise ConfigError("the stream of training rows is not open; give train= and call setup() first.")
        share = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        if self._packed is not None:
            return self._loader(self._packed, self._sampler(**share), CollatePacked(self._pad_id))
        collate = (CollateEvenly if self.packing else Collate)(self._pad_id)
        if self._stream is not None:
            return self._loader(Drawn(), StreamSampler(self._stream, **share), collate)
        return self._loader(self._examples("train"), self._sampler(**share), collate)

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """Validation rows in the order of the files; an empty list without ``validation``."""
        return self._in_file_order("validation") if self.sources["validation"] is not None else []

    @override
    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Test rows in the order of the files."""
        return self._in_file_order("test")

    @override
    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Test rows in the order of the files."""
        return self._in_file_order("test")

    def _in_file_order(self, split: str) -> DataLoader[dict[str, Tensor]]:
        rows = self._examples(split)
        return self._loader(rows, SequentialSampler(rows), Collate(self._pad_id))

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
            generator=torch.Generator().manual_seed(_scrambled(self.seed)),  # or the loader draws from the global one
        )

    def _examples(self, split: str) -> Any:
        if split not in self.rows:
            raise ConfigError(f"no {split} rows are loaded; give {split}= and call setup() first.")
        return self.rows[split].select_columns(["input_ids", "supervised"]).with_format("numpy")

    def _sampler(self, num_replicas: int, rank: int) -> DistributedSampler[Any]:
        # Lightning keeps a DistributedSampler as it is; one that it makes would take the global seed.
        if self._packed is not None:
            return PackSampler(self._packed, _scrambled(self.seed), num_replicas, rank)
        return DistributedSampler(self._examples("train"), num_replicas, rank, seed=_scrambled(self.seed))

    def _pack(self) -> None:
        """Decide which training rows share a row, and count what that saves in the first epoch on one device."""
        self._packed = None  # of an earlier setup
        lengths = row_lengths(self.rows["train"], self.settings.max_length)
        unpacked = batched(lengths[list(self._sampler(1, 0))].tolist(), self.batch_size)
        if self.packing == "length":
            self._packed = PackedRows(self._examples("train"), lengths, self.settings.max_length, _scrambled(self.seed))
            packed = batched([int(lengths[list(pack)].sum()) for pack in self._sampler(1, 0)], self.batch_size)
        else:
            packed = [[sum(batch[i] for i in row) for row in even_rows(batch)] for batch in unpacked]
        self.statistics["train"] = counts = self.statistics["train"].with_packing(packed, unpacked)
        rank_zero_info(
            f"train: {counts.rows} rows packed into {counts.packed_rows}; {counts.filled:.1%} of the positions in a "
            f"batch hold tokens, {counts.filled_unpacked:.1%} without packing"
        )

    def _read(
        self, splits: list[str], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[dict[str, Dataset], list[SourceReport]]:
        held = {split: self.sources[split] for split in splits if not (self.streaming and split == "train")}
        return read_splits(held, tokenizer, self.settings, self.limits, self.on_bad_row, self.num_proc)

    def _splits(self, stage: str | None) -> list[str]:
        given = [split for split, names in self.sources.items() if names is not None]
        if stage is None:
            return given
        needed, *optional = _STAGES[stage]
        if needed not in given:
            raise ConfigError(f"{stage} needs {needed} rows: give {needed}= files or a hub name.")
        return [needed, *(split for split in optional if split in given)]

    def _find_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            return find_tokenizer(None, self._module())
        self.tokenizer = find_tokenizer(self.tokenizer, None)
        return self.tokenizer

    def _vocab_size(self) -> int | None:
        size = getattr(self._module(), "vocab_size", None)
        return size if isinstance(size, int) else None

    def _module(self) -> LightningModule | None:
        return self.trainer.lightning_module if self.trainer else None


def _scrambled(seed: int) -> int:
    # DistributedSampler adds the epoch to its seed, and torch keeps 32 bits of the sum. Epoch 1 of seed 0 must differ
    # from epoch 0 of seed 1, and seed 2**32 from seed 0.
    return random.Random(seed).getrandbits(32)
