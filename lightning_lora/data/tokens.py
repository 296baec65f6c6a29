"""Rows to a cached dataset of tokens, made once per node and shared by its processes and by later runs."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import pyarrow
import tokenizers
import transformers
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_lora.data.bad_rows import BadRows, RowError
from lightning_lora.data.chat.template import template_identity
from lightning_lora.data.processes import map_in_order
from lightning_lora.data.reading import Row
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.sources import FileSource, HubSource
from lightning_lora.data.terminal_progress import progress_on_terminals
from lightning_lora.data.token_table import COLUMNS, Chunk, ToTokens, find_example
from lightning_lora.errors import DataError, DataSettingError, LoRAError

_CHUNK = 1000
"""Number of rows tokenised together."""


def tokenise(
    source: FileSource | HubSource,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    limit: int | None,
    num_proc: int = 1,
) -> Dataset:
    """Tokenise the rows of a source, or take the tokens from the cache if nothing has changed.

    Args:
        source: The file or hub dataset to read.
        tokenizer: A fast tokenizer.
        settings: How rows become tokens.
        limit: Number of rows to read, from the first; None reads all.
        num_proc: Processes that tokenise. The tokens are the same for any number.

    Returns:
        A dataset with the columns of `COLUMNS`, in which rows that cannot be used have no tokens but a ``problem``.

    Raises:
        ConfigError: If the cache folder cannot be written.
        DataError: If the source cannot be read, or if no row at its beginning is of a known format.
    """
    key = [source.identity(), tokenizer_identity(tokenizer), settings.identity(), limit, code_identity()]
    key.append(template_identity(tokenizer, settings))
    with progress_on_terminals():
        builder = _TokenFiles(
            functools.partial(_tables, source, tokenizer, settings, limit, num_proc),
            cache_dir=cache_folder(),
            config_id=hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32],
        )
        try:
            builder.download_and_prepare()
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, LoRAError):
                raise error.__cause__ from error.__cause__.__cause__
            raise DataError(f"{source.name} cannot be tokenised: {error.__cause__ or error}") from error
        tokens = builder.as_dataset(split="train")
    assert isinstance(tokens, Dataset)
    return tokens


def token_tables(
    rows: Iterable[Row | RowError],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    num_proc: int = 1,
    are_documents: bool = False,
) -> Generator[pyarrow.Table, None, None]:
    """Tokenise rows as they are read, in order.

    Args:
        rows: The rows of one source.
        name: Name of the source, for messages.
        tokenizer: A fast tokenizer.
        settings: How rows become tokens.
        num_proc: Processes that tokenise.
        are_documents: Whether each row is a text that fills as many rows of tokens as it needs.

    Yields:
        Tables with the columns of `COLUMNS`.

    Raises:
        DataError: If there is no row, or if none at the beginning is of a known format.
    """
    rows = iter(rows)
    head = list(islice(rows, _CHUNK))
    if not head:
        raise DataError(f"{name} has no rows.")
    example = find_example(head, settings)
    if isinstance(example, list):
        found = BadRows(name, rows=len(head))
        for error in example:
            found.add(error)
        raise DataError(str(found))
    chunks = _chunks(head, rows)
    yield from map_in_order(ToTokens(tokenizer, settings, example, are_documents), chunks, num_proc)


def cache_folder() -> str:
    """The cache folder of ``datasets``, after a check that it can be written.

    Raises:
        ConfigError: If it cannot be written.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except OSError as error:
        raise DataSettingError(
            f"tokenised data cannot be written to {folder} ({error}). Set the environment variable HF_DATASETS_CACHE "
            "to a folder that can be written."
        ) from error


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything in a tokenizer that affects the ids and the mask.

    Raises:
        ConfigError: If the tokenizer is not a fast one; only fast ones know which characters a token covers.
    """
    if not tokenizer.is_fast:
        raise DataSettingError(f"{type(tokenizer).__name__} is not a fast tokenizer; load it with AutoTokenizer.")
    tokenizer("", padding=False, truncation=False)  # the state of the last call is part of what is hashed
    described: str = tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
    parts = [described, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def code_identity() -> str:
    """A hash of all that decides what a row becomes besides the settings: library versions and this room's source.

    All of the room counts, not a list of files that could miss one.
    """
    digest = hashlib.sha256(f"{transformers.__version__} {tokenizers.__version__}".encode())
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class _TokenFiles(datasets.ArrowBasedBuilder):
    """Writes tables to the cache of ``datasets``, whole or not at all, in one process at a time."""

    def __init__(self, tables: Callable[[], Iterator[pyarrow.Table]], **options: Any) -> None:
        self.tables = tables
        super().__init__(**options)

    @override
    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=COLUMNS)

    @override
    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train")]

    @override
    def _generate_tables(self, **_: Any) -> Iterator[tuple[Any, pyarrow.Table]]:
        return enumerate(self.tables())  # type: ignore[return-value]


def _tables(
    source: FileSource | HubSource,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    limit: int | None,
    num_proc: int,
) -> Iterator[pyarrow.Table]:
    with closing(source.rows()) as rows:
        yield from token_tables(islice(rows, limit), source.name, tokenizer, settings, num_proc, source.is_document)


def _chunks(head: list[Row | RowError], rows: Iterator[Row | RowError]) -> Iterator[Chunk]:
    start = 0
    for chunk in chain([head], iter(lambda: list(islice(rows, _CHUNK)), [])):
        yield Chunk(start, chunk)
        start += len(chunk)
