"""Adapters, bases and folders that tests of the files room write."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_lora import LoRAConfig, inject_lora, save_adapter
from lightning_lora.files import atomic
from lightning_lora.files.adapter.peft_format import CONFIG_FILE
from tests.support.tiny_models import gpt2, llama, wake


def adapted(build: Callable[..., Any] = llama, **settings: Any) -> Any:
    """A model with adapters of rank 4 and random factors."""
    model = build()
    inject_lora(model, LoRAConfig.from_dict({"rank": 4, **settings}))
    wake(model)
    return model


TABLES = {"adapt_embeddings": True}
# Model, settings of the adapter, size of a shard.
MERGE_CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], str]] = {
    "one file": (llama, {}, "1GB"),
    "shards": (llama, {}, "20KB"),
    "tied": (lambda: llama(tie_word_embeddings=True), {}, "20KB"),
    "head and embeddings": (llama, {"adapt_head": True, **TABLES}, "1GB"),
    "patterns": (llama, {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"*.layers.1.*": 5.0}}, "1GB"),
    "rslora": (llama, {"scaling": "rslora", "rank_pattern": {"up_proj": 2}}, "1GB"),
    "kept start": (llama, {"init": "pissa", "scaling": "rslora"}, "1GB"),
    "gradient start": (llama, {"init": "gradient"}, "1GB"),
    "magnitudes": (llama, {"dora": True}, "20KB"),
    "gpt2": (gpt2, {}, "1GB"),
    "gpt2 embeddings": (lambda: gpt2(tie_word_embeddings=False), TABLES, "20KB"),
    # Square in every way: the shapes do not tell what is transposed.
    "square tables": (lambda: llama(vocab_size=64, hidden_size=64), {"targets": "mlp", **TABLES}, "1GB"),
    "square positions": (lambda: gpt2(n_positions=32, tie_word_embeddings=False), TABLES, "1GB"),
    "trained in full": (llama, {"trainable": ["norm", "lm_head"]}, "1GB"),
}


def write_merge_case(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Write a base and an adapter into ``folder``, as ``base`` and ``adapter``; returns the adapted model."""
    build, settings, shard = MERGE_CASES[case]
    build().to(dtype).save_pretrained(folder / "base", max_shard_size=shard)  # pyright: ignore[reportArgumentType]
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    inject_lora(model, LoRAConfig.from_dict({"rank": 4, **settings}))
    wake(model, size=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 0.1
    save_adapter(model, folder / "adapter")
    return model


def write_folder(path: Path, text: str) -> None:
    """Write a folder that counts as an adapter folder when it is replaced."""
    with atomic.atomic_folder(path, replaces=CONFIG_FILE) as folder:
        (folder / CONFIG_FILE).write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text(text)


def read_texts(folder: Path) -> dict[str, str]:
    """Relative path to text of every file below a folder."""
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def dead_pid() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def leftover(target: Path, pid: int, suffix: str = "tmp", host: str = atomic._HOST) -> Path:
    """The path of a temporary copy of ``target`` that process ``pid`` would write."""
    return target.with_name(f".{target.name}.{pid}.{host}{'0' * 16}.{suffix}")
