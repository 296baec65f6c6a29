"""Rows to a cached dataset of tokens, made once per node and shared by its processes and by later runs."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets.config
import tokenizers
import transformers
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from lightning_lora.errors import ConfigError, DataError, LoRAError

from . import chat, encoding, formats, reading, records
from .bad_rows import RowError
from .chat.template import template_identity
from .encoding import Encoded, encode
from .formats.find import find_format
from .records import Conversation, Text
from .settings import RowSettings
from .sources import FileSource, HubSource
from .terminal_progress import progress_on_terminals

_BATCH = 1000
"""Number of rows tokenised together."""

COLUMNS = Features(
    {
        "input_ids": List(Value("int32")),
        "supervised": List(Value("bool")),
        "length": Value("int32"),
        "supervised_tokens": Value("int32"),
        "largest_id": Value("int32"),
        "open_ended": Value("bool"),
        "place": Value("string"),
        "renamed": Value("string"),
        "unused": Value("string"),
    }
)
"""Columns of a row of tokens: ids and mask after cutting, number of tokens before cutting, number of supervised tokens
after it, the largest id, whether the conversation ends with a turn that is not the assistant's, the origin, and, one on
a line, the user's names that were mapped and names that nothing reads."""


def tokenise(
    source: FileSource | HubSource, tokenizer: PreTrainedTokenizerBase, settings: RowSettings, limit: int | None
) -> Dataset:
    """Tokenise the rows of a source, or take the tokens from the cache if nothing has changed.

    Args:
        source: The file or hub dataset to read.
        tokenizer: A fast tokenizer.
        settings: How rows become tokens.
        limit: Number of rows to read, from the first; None reads all.

    Returns:
        A dataset with the columns of `COLUMNS`.

    Raises:
        ConfigError: If the cache folder cannot be written.
        DataError: If the source cannot be read or a row of it cannot be used.
    """
    try:
        key = [source.identity(), tokenizer_identity(tokenizer), settings.identity(), limit]
        key.append(template_identity(tokenizer, settings))
        with progress_on_terminals():
            return Dataset.from_generator(
                partial(_token_rows, source, tokenizer, settings, limit),
                features=COLUMNS,
                cache_dir=cache_folder(),
                fingerprint=hashlib.sha256(json.dumps([key, _CODE]).encode()).hexdigest()[:32],
            )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, LoRAError):
            raise error.__cause__ from error.__cause__.__cause__
        raise DataError(f"{source.name} cannot be tokenised: {error.__cause__ or error}") from error


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
        raise ConfigError(
            f"tokenised data cannot be written to {folder} ({error}). Set the environment variable HF_DATASETS_CACHE "
            "to a folder that can be written."
        ) from error


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything in a tokenizer that affects the ids and the mask.

    Raises:
        ConfigError: If the tokenizer is not a fast one; only fast ones know which characters a token covers.
    """
    if not tokenizer.is_fast:
        raise ConfigError(f"{type(tokenizer).__name__} is not a fast tokenizer; load it with AutoTokenizer.")
    tokenizer("", padding=False, truncation=False)  # the state of the last call is part of what is hashed
    described: str = tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
    parts = [described, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _token_rows(
    source: FileSource | HubSource, tokenizer: PreTrainedTokenizerBase, settings: RowSettings, limit: int | None
) -> Iterator[dict[str, Any]]:
    with closing(source.rows()) as whole:
        rows = islice(whole, limit)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{source.name} has no rows.")
        read = find_format(first, settings).read
        rows = chain([first], rows)
        while batch := [read(row) for row in islice(rows, _BATCH)]:
            for record, encoded in zip(batch, encode(tokenizer, batch, settings), strict=True):
                if isinstance(encoded, RowError):
                    raise encoded
                for row in encoded:
                    yield _token_row(record, row, settings.max_length)


def _token_row(record: Conversation | Text, encoded: Encoded, max_length: int) -> dict[str, Any]:
    supervised = encoded.supervised[:max_length]
    return {
        "input_ids": encoded.ids[:max_length],
        "supervised": supervised,
        "length": len(encoded.ids),
        "supervised_tokens": int(supervised.sum()),
        "largest_id": int(encoded.ids[:max_length].max(initial=-1)),
        "open_ended": isinstance(record, Conversation) and record.messages[-1]["role"] != "assistant",
        "place": record.place,
        "renamed": "\n".join(sorted(record.renamed)),
        "unused": "\n".join(sorted(record.unused | encoded.unused)),
    }


_CODE = [
    transformers.__version__,
    tokenizers.__version__,
    *(inspect.getsource(module) for module in (reading, records, encoding)),
    *(
        path.read_text(encoding="utf-8")
        for room in (chat, formats)
        for path in sorted(Path(room.__path__[0]).glob("*.py"))
    ),
]
"""Library versions and code that affect the tokens: a part of the cache key, so that a change makes new tokens."""
