"""The data module for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_lora.data.batches.bins import batched, even_rows
from lightning_lora.data.batches.collate import Collate, CollateEvenly, CollatePacked
from lightning_lora.data.batches.packing import PackedRows, PackSampler
from lightning_lora.data.rows_module import RowsDataModule
from lightning_lora.data.sampling.mixture import Mixture, MixtureSampler
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.split import column, row_lengths
from lightning_lora.data.splits_module import scrambled
from lightning_lora.data.streaming import Drawn, StreamSampler
from lightning_lora.errors import DataSettingError, check_arguments


class SFTDataModule(RowsDataModule):
    """Data for supervised fine-tuning: files or hub datasets to batches with a loss on the answers only.

    Each of ``train``, ``validation`` and ``test`` is a file, a glob, a hub name, or a list of these. Files are
    ``.json`` (a list of objects, or one object per line), ``.jsonl``, ``.csv``, ``.tsv`` and ``.txt``, each also with
    ``.gz`` or ``.zst``, ``.parquet`` and ``.arrow``. A ``.txt`` file is one text, which becomes as many rows of at most
    ``max_length`` tokens as it needs. A name that is not on disk and does not look like a path is a hub name: ``name``,
    ``owner/name``, ``owner/name:split`` or ``owner/name:config:split``.

    ``train`` may also map names to shares, ``{"a.jsonl": 0.7, "b.jsonl": 0.3}``: an epoch then has 70 % of its rows
    from the first source. It ends before a row would be needed twice; the next epoch goes on with other rows.

    The columns decide how rows are read; the first format that fits is used: ``messages`` (role, content),
    ``conversations`` (from, value), ``instruction`` with optional ``input`` and ``output`` or ``response``, ``prompt``
    and ``completion``, ``question`` and ``answer``, ``text``. Beside these a row may have a system prompt, tools,
    documents, options, history and a weight (docs/use/data.md). Conversations are rendered by the tokenizer's chat
    template. The loss is on every assistant turn and the token that ends it, or on all of a plain text.

    Batches have ``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, tokens)``; ``labels`` is -100 where
    there is no loss. With ``packing``, training batches have ``position_ids`` instead of ``attention_mask``, which
    start at 0 with each example; `CausalLM` refuses models in which packed examples would see each other. Rows for
    validation, test and prediction are never packed. Batches have ``weights`` too, ``(rows, tokens)``, if any row of
    the split has a ``weight`` other than 1. By their ``facts``, `BatchFacts` of the labels, `CausalLM` trains without
    waiting for the device: leave them out where you change labels, or give ``**batch`` to a function that refuses them.

    Tokens are cached in ``HF_DATASETS_CACHE``. The order of the training rows depends on ``seed`` and the epoch only,
    not on the number of devices or on other random draws.

    Args:
        train: Training rows, or a mapping from sources to their shares of the rows. None if only validating or testing.
        validation: Rows for the validation loss. None skips validation.
        test: Rows for ``test`` and ``predict``.
        batch_size: Rows in a batch on each device.
        max_length: Tokens kept of each row, from its beginning. A warning counts the rows that are cut and those left
            without a loss.
        tokenizer: A folder, a hub name or a tokenizer. None takes the tokenizer of the model that is trained.
        num_workers: Processes that make batches. 0 makes them in the main process, which is usually fast enough.
        seed: Seeds the order of the training rows and the choice of ``validation_share``; an integer of at least 0.
        max_rows: Use only this many rows of ``train``, from the first. None uses all. A conversation that becomes
            several rows of tokens counts once.
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
        validation_share: Share of the conversations of ``train``, above 0 and below 1, that is held out for validation.
            None holds out none.
        beyond_context: Allow rows longer than the context of the model.
        on_bad_row: What to do if rows cannot be used: ``"error"`` stops with one error about all of them, ``"skip"``
            leaves them out with a warning.
        num_proc: Processes that tokenise; the tokens are the same for any number.
        streaming: Whether to read and tokenise ``train`` while training, without downloading or caching it: for data
            larger than the disk. The order is then a shuffle among 10,000 rows at a time.

    Attributes:
        statistics: Counts of each split that was set up, a `SplitStatistics` by name of the split; not of a stream.
        rows: Tokens of each split that was set up and is no stream, a dataset by name of the split with the columns
            ``input_ids``, ``supervised``, ``weight`` and ``place`` (the origin of the row).

    Raises:
        ConfigError: If a setting is out of its range. In ``setup``: if there is no tokenizer, no data for the stage, or
            a row is longer than the context of the model.
        DataError: In ``setup``: if a file or a row cannot be used.
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, float] | None = None,
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
        validation_share: float | None = None,
        beyond_context: bool = False,
        on_bad_row: str = "error",
        num_proc: int = 1,
        streaming: bool = False,
    ) -> None:
        if not isinstance(packing, bool) and packing not in ("length", "batch"):
            raise DataSettingError(f"packing must be true (or 'length'), 'batch' or false, got {packing!r}.")
        settings = RowSettings(
            max_length,
            columns or {},
            train_on,
            chat_template,
            chat_template_kwargs or {},
            end_of_answer,
            prompt_separator,
        )
        sources = {"train": train, "validation": validation, "test": test}
        limits = {"train": max_rows, "validation": validation_rows, "test": None}
        super().__init__(
            sources,
            settings,
            tokenizer,
            seed,
            limits,
            validation_share,
            beyond_context,
            on_bad_row,
            num_proc,
            streaming,
            batch_size,
            num_workers,
        )
        check_arguments(SFTDataModule, locals(), DataSettingError)
        self._tell_unused(SFTDataModule, locals(), "max_rows", "packing", "streaming")
        self.packing = "length" if packing is True else packing
        if streaming and self.packing == "length":
            raise DataSettingError(
                "packing: true needs all rows at once, and streaming never has them: set packing: batch."
            )
        self._mixture: Mixture | None = None
        self._packed: PackedRows | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load the tokens, check them against the model and count them; None sets up all splits that were given."""
        super().setup(stage)
        if "train" in self.rows:
            self._mix()
            if self.packing:
                self._pack()

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Training rows in an order given by ``seed`` and epoch, of which each device gets its share."""
        if self.streaming and self.stream is None:
            raise DataSettingError("the stream of training rows is not open; give train= and call setup() first.")
        share = self._share()
        if self._packed is not None:
            return self._loader(self._packed, self._sampler(*share), self._collate(CollatePacked, "train"))
        collate = self._collate(CollateEvenly if self.packing else Collate, "train")
        if self.stream is not None:
            return self._loader(Drawn(), StreamSampler(self.stream, *share), collate)
        return self._loader(self._examples("train"), self._sampler(*share), collate)

    @override
    def _examples(self, split: str) -> Any:
        return self._loaded(split).select_columns(["input_ids", "supervised", "weight"]).with_format("numpy")

    @override
    def first_rows(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """The names and tokens of the first ``count`` training rows; of a stream, those that are drawn first."""
        if self.stream is None:
            return super().first_rows(count)
        drawn = enumerate(islice(iter(self.train_dataloader().sampler), count), start=1)
        about = {"place": "as drawn from the stream"}
        return [(f"row {n}", {**row, **about, "length": len(row["input_ids"])}) for n, row in drawn]

    @override
    def _collator(self, split: str, weighted: bool) -> Any:
        return Collate(self._pad_id, weighted)

    def _collate(self, kind: Callable[..., Callable[[Any], dict[str, Tensor]]], split: str) -> Any:
        return kind(self._pad_id, self._is_weighted(split))

    def _sampler(self, num_replicas: int, rank: int) -> DistributedSampler[Any]:
        # Lightning keeps a DistributedSampler as it is; one that it makes would take the global seed.
        if self._packed is not None:
            return PackSampler(self._packed, scrambled(self.seed), num_replicas, rank)
        if self._mixture is not None:
            return MixtureSampler(self._mixture, scrambled(self.seed), num_replicas, rank)
        return DistributedSampler(self._examples("train"), num_replicas, rank, seed=scrambled(self.seed))

    def _mix(self) -> None:
        """Decide which training rows an epoch has if sources have shares."""
        self._mixture = self._packed = None  # of an earlier setup
        if self.shares is None:
            return
        rows, limit = self.rows["train"], self.limits["train"]
        lengths = row_lengths(rows, self.settings.max_length)
        self._mixture = Mixture(lengths, column(rows, "source"), self.shares, limit, scrambled(self.seed))
        self.statistics["train"] = counts = self.statistics["train"].with_mixture(self._mixture)
        parts = (
            f"{source.epoch_rows:,} from {name} ({source.epoch_rows / len(self._mixture):.1%}), each of its "
            f"{source.rows:,} rows {source.epoch_rows / source.rows:.2f} times"
            for name, source in counts.sources.items()
        )
        rank_zero_info(f"train: an epoch has {len(self._mixture):,} rows: {'; '.join(parts)}")

    def _pack(self) -> None:
        """Decide which training rows share a row, and count what that saves in the first epoch on one device."""
        lengths = row_lengths(self.rows["train"], self.settings.max_length)
        unpacked = batched(lengths[list(self._sampler(1, 0))].tolist(), self.batch_size)
        if self.packing == "length":
            in_epoch = lengths if self._mixture is None else self._mixture.lengths
            capacity, seed = self.settings.max_length, scrambled(self.seed)
            self._packed = PackedRows(self._examples("train"), in_epoch, capacity, seed, self._mixture)
            packed = batched([int(lengths[list(pack)].sum()) for pack in self._sampler(1, 0)], self.batch_size)
        else:
            packed = [[sum(batch[i] for i in row) for row in even_rows(batch)] for batch in unpacked]
        self.statistics["train"] = counts = self.statistics["train"].with_packing(packed, unpacked)
        num_rows = sum(source.epoch_rows for source in counts.sources.values())
        rank_zero_info(
            f"train: {num_rows} rows packed into {counts.packed_rows}; {counts.filled:.1%} of the positions in a "
            f"batch hold tokens, {counts.filled_unpacked:.1%} without packing"
        )
