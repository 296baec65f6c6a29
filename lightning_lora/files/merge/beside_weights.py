"""The files beside the weights of a merged model: the base's, with the tokenizer that came with the adapter."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from lightning_lora.errors import DamagedFileError
from lightning_lora.files.json_object import read_json
from lightning_lora.files.merge.tied_tensors import TiedTensors, untied_config
from lightning_lora.files.safetensors_header import read_header

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "vocab.*", "merges.txt",
    "*.model", "additional_chat_templates",
)  # fmt: skip


def copy_others(base: Path, adapter: Path, target: Path) -> None:
    """Copy what is no weight from ``base``, and the tokenizer from ``adapter`` if there is one.

    The tokenizer of the adapter replaces the base's as a whole: of two chat templates in different files, transformers
    would read the one that happens to come first.
    """
    brings_tokenizer = (adapter / "tokenizer_config.json").is_file()
    for entry in base.iterdir():
        if not (brings_tokenizer and _is_of_tokenizer(entry)):
            _copy(entry, target)
    for entry in adapter.iterdir() if brings_tokenizer else ():
        if _is_of_tokenizer(entry):
            _copy(entry, target)


def update_index(folder: Path, dtype: str | None, tied: TiedTensors) -> None:
    """Name the tensors that were split in the index of the shards, and count the bytes again."""
    index = folder / "model.safetensors.index.json"
    if (dtype is None and not tied.sources) or not index.is_file():
        return
    content = read_json(index)
    content["weight_map"] |= {name: content["weight_map"][source] for name, source in tied.sources.items()}
    headers = [read_header(folder / file) for file in set(content["weight_map"].values())]
    spans = [span for header in headers for span in header.tensors.values()]
    content["metadata"] = content.get("metadata", {}) | {"total_size": sum(span.end - span.start for span in spans)}
    _write(index, content)


def update_config(folder: Path, dtype: str | None, tied: TiedTensors) -> None:
    """Write the type of the weights, and that none are shared any more, to the config."""
    path = folder / "config.json"
    if (dtype is None and not tied.declared) or not path.is_file():
        return
    config = read_json(path)
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    _write(path, untied_config(config) if tied.declared else config)


def _is_of_tokenizer(entry: Path) -> bool:
    return any(fnmatch(entry.name, pattern) for pattern in _TOKENIZER)


def _copy(entry: Path, target: Path) -> None:
    if entry.is_dir():
        # The only folder that is part of a model; others beside a checkpoint belong to somebody's run.
        if entry.name == "additional_chat_templates":
            shutil.copytree(entry, target / entry.name)
    elif entry.suffix != ".safetensors" and entry.suffix not in _PICKLES:
        if not entry.is_file():
            raise DamagedFileError(f"{entry} is a link to nothing, a pipe or a device: put a file there, or remove it.")
        shutil.copyfile(entry, target / entry.name)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
