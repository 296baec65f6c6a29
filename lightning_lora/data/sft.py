"""Supervised fine-tuning data."""

from __future__ import annotations

import dataclasses
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

from .bins import batches, even_rows, filled
from .collate import Collate, CollateEvenly, CollatePacked
from .packing import PackedRows, PackSampler
from .split import SplitStatistics, check_ids, keep_supervised, read_split, row_lengths
from .tokenizer import find_tokenizer, pad_id

_STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("test",)}
"""Splits of each stage, the one it cannot do without first."""


class SFTDataModule(LightningDataModule):
    """Batches of ``input_ids``, ``attention_mask`` and ``labels`` with loss on the answers only.

    Each of ``train``, ``validation`` and ``test`` is a file, a glob, a hub name, or a list of these. Files are
    ``.json`` (a list of objects, or one per line), ``.jsonl``, ``.csv``, each also with ``.gz``, and ``.parquet``. A
    name is a hub name (``name``, ``owner/name``, ``owner/name:split`` or ``owner/name:config:split``) when nothing on
    disk has it and it cannot be a path.

    The columns decide how a row is read, by the first that fits: ``messages`` (role, content), ``conversations``
    (from, value), ``instruction`` with optional ``input`` and ``output`` or ``response``, ``prompt`` and
    ``completion``, ``question`` and ``answer``, ``text``. Conversations go through the tokenizer's chat template. The
    loss is on every assistant turn and the token that ends it, or on all of a plain text.

    With ``packing``, training rows are laid one behind the other instead of padded, and batches have ``position_ids``,
    which start at 0 with each example, in the place of ``attention_mask``. `CausalLM` refuses models in which examples
    would then see each other. Rows to validate, test and predict on are never packed.

    Tokens are cached in ``HF_DATASETS_CACHE``. The same ``seed`` gives the same order of rows in every epoch, on any
    number of devices and whatever else draws random numbers.

    Args:
        train: Rows to train on; ``None`` when only validating or testing.
        validation: Rows for the validation loss; ``None`` skips validation.
        test: Rows for ``test`` and ``predict``.
        batch_size: Rows per batch and device.
        max_length: Tokens kept of a row, from its beginning. Rows cut and rows left without loss are counted and
            warned about.
        tokenizer: Folder, hub name or tokenizer; ``None`` takes the one of the model being trained.
        num_workers: Processes that make batches; 0 makes them in the main process, which is mostly fast enough.
        seed: Decides the order of the training rows, 0 or more.
        max_rows: Use only the first rows of ``train``; ``None`` uses all.
        validation_rows: Use only the first rows of ``validation``; ``None`` uses all.
        packing: ``"length"`` or true fills training rows with examples up to ``max_length`` tokens; ``batch_size``
            then counts the filled rows. ``"batch"`` keeps the examples of each batch together and lays them in fewer
            rows, so that every optimizer step is the one it would be unpacked. False pads each row.

    Attributes:
        statistics: Counts of each split that has been set up.
        rows: The tokens of each split that has been set up, a dataset with ``input_ids``, ``supervised`` and the
            ``place`` each row came from.

    Raises:
        ConfigError: If a number is out of its range. Later: if there is no tokenizer, or no data for what is run.
        DataError: Later: if a file or a row cannot be used.
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
    ) -> None:
        super().__init__()
        numbers = {"batch_size": (batch_size, 1), "max_length": (max_length, 1), "num_workers": (num_workers, 0)}
        numbers |= {"seed": (seed, 0), "max_rows": (max_rows, 1), "validation_rows": (validation_rows, 1)}
        for name, (value, least) in numbers.items():
            optional = name.endswith("_rows") and value is None
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{name} must be a whole number of {least} or more, got {value!r}.")
        if not isinstance(packing, bool) and packing not in ("length", "batch"):
            raise ConfigError(f"packing must be true (or 'length'), 'batch' or false, got {packing!r}.")
        self.packing = "length" if packing is True else packing
        self.sources = {"train": train, "validation": validation, "test": test}
        self.batch_size = batch_size
        self.max_length = max_length
        self.tokenizer = tokenizer
        self.num_workers = num_workers
        self.seed = seed
        self.limits = {"train": max_rows, "validation": validation_rows, "test": None}
        self.statistics: dict[str, SplitStatistics] = {}
        self.rows: dict[str, Dataset] = {}
        self._pad_id = 0
        self._packed: PackedRows | None = None
        if validation is None:
            # Lightning then says that validation is skipped, instead of wondering about a loader of length zero.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    @override
    def prepare_data(self) -> None:
        """Fill the cache, in one process per node."""
        tokenizer = self._find_tokenizer()
        for split in self._splits(self.trainer.state.fn if self.trainer else None):
            self._read(split, tokenizer)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load the tokens, check them against the model, count them. ``None`` sets up all splits given."""
        tokenizer = self._find_tokenizer()
        vocab_size = self._vocab_size()
        self._pad_id = pad_id(tokenizer, vocab_size)
        for split in self._splits(stage):
            rows = self._read(split, tokenizer)
            if vocab_size is not None:
                check_ids(rows, vocab_size)
            self.rows[split], self.statistics[split] = keep_supervised(rows, split, self.max_length)
            if split == "train" and self.packing:
                self._pack()
        if self.num_workers:
            # Workers only read tokens; without this, tokenizers before 0.23 warn at every fork that they were used.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Rows in the order of ``seed`` and epoch; every device gets its share of the same order."""
        # Lightning keeps a DistributedSampler as it is; one of its own would take the global seed.
        share = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        rows, packed = self._examples("train"), self._packed
        if packed is not None:
            return self._loader(packed, PackSampler(packed, _spread(self.seed), **share), CollatePacked(self._pad_id))
        collate = (CollateEvenly if self.packing else Collate)(self._pad_id)
        return self._loader(rows, DistributedSampler(rows, seed=_spread(self.seed), **share), collate)

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """Rows in the order of the files; nothing without ``validation``."""
        return self._in_file_order("validation") if self.sources["validation"] is not None else []

    @override
    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Rows in the order of the files."""
        return self._in_file_order("test")

    @override
    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Rows of ``test`` in the order of the files."""
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
            generator=torch.Generator().manual_seed(_spread(self.seed)),  # or the loader would draw from the global one
        )

    def _examples(self, split: str) -> Any:
        if split not in self.rows:
            raise ConfigError(f"no {split} rows are loaded; give {split}= and call setup() first.")
        return self.rows[split].select_columns(["input_ids", "supervised"]).with_format("numpy")

    def _pack(self) -> None:
        """Decide which training rows share a row, and say what that saves."""
        rows, seed = self._examples("train"), _spread(self.seed)
        lengths = row_lengths(self.rows["train"], self.max_length)
        order = list(DistributedSampler(rows, num_replicas=1, rank=0, seed=seed))
        unpacked = list(batches(lengths[order].tolist(), self.batch_size))
        if self.packing == "length":
            self._packed = PackedRows(rows, lengths, self.max_length, seed)
            packs = PackSampler(self._packed, seed, num_replicas=1, rank=0)
            packed = list(batches([int(lengths[list(pack)].sum()) for pack in packs], self.batch_size))
        else:
            packed = [[sum(batch[i] for i in row) for row in even_rows(batch)] for batch in unpacked]
        counts = dataclasses.replace(
            self.statistics["train"],
            packed_rows=sum(map(len, packed)),
            filled=filled(packed),
            filled_unpacked=filled(unpacked),
        )
        self.statistics["train"] = counts
        rank_zero_info(
            f"train: {counts.rows} rows packed into {counts.packed_rows}; {counts.filled:.1%} of the places in a batch "
            f"hold tokens, {counts.filled_unpacked:.1%} without packing"
        )

    def _read(self, split: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        names = self.sources[split]
        assert names is not None
        return read_split(names, split, tokenizer, self.max_length, self.limits[split])

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


def _spread(seed: int) -> int:
    # DistributedSampler adds the epoch to its seed, and torch keeps 32 bits of the sum:
    # epoch 1 of seed 0 must not be epoch 0 of seed 1, nor seed 2**32 be seed 0.
    return random.Random(seed).getrandbits(32)
