from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets.config
import pytest
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_tokenizer import tiny_tokenizer

Write = Callable[[str, Any], str]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def examples(batch: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each example of a padded or packed batch, without padding."""
    found = []
    for index, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        if "position_ids" in batch:
            starts = [*(batch["position_ids"][index] == 0).nonzero().flatten().tolist(), len(ids)]
        else:
            starts = [0, int(batch["attention_mask"][index].sum())]
        for start, end in pairwise(starts):
            if (labels[start:end] != -100).any():
                found.append((ids[start:end].tolist(), labels[start:end].tolist()))
    return found


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "unset")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")  # set and deleted, so that it is deleted again afterwards
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows, a text or bytes to a file and returns its path."""

    def write(name: str, content: Any) -> str:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        if isinstance(content, str):
            content = content.encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write
