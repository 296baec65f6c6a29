"""The commands that come after a run, ready to be pasted."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_lora.data import SFTDataModule
from lightning_lora.files.adapter.peft_format import CONFIG_FILE
from lightning_lora.files.json_object import read_json
from lightning_lora.tasks import CausalLM
from lightning_lora.tasks.by_name import TASKS
from lightning_lora.tasks.pretrained import PretrainedTask

PROMPT = "Hello! What can you do?"
"""A question for a model whose run had no validation rows."""


def next_commands(
    module: LightningModule, data: LightningDataModule | None, folder: Path, adapter: Path | None
) -> list[str]:
    """The commands that generate text, merge and export, as far as they apply to a module.

    Args:
        module: The module that was trained.
        data: Its data module; ``generate`` asks rows of a validation file by itself.
        folder: The run folder.
        adapter: Its adapter folder; None without adapters.
    """
    # A checkpoint of a class of the user's cannot be built from here, but its adapter can be read.
    is_ours = type(module) in TASKS
    source, merged = shown(folder if is_ours or adapter is None else adapter), shown(folder / "merged")
    commands = []
    if isinstance(module, CausalLM) and (is_ours or adapter):
        has_rows = isinstance(data, SFTDataModule) and data.sources["validation"] is not None
        commands.append(["generate", source, *([] if has_rows else ["--prompt", PROMPT])])
    if adapter is None:
        return [_line(command) for command in commands]
    commands[0:1] = [[*command, "--compare"] for command in commands]
    base = read_json(adapter / CONFIG_FILE).get("base_model_name_or_path")
    has_new_head = isinstance(module, PretrainedTask) and module.new_head
    if base and Path(base).is_dir() and not has_new_head:
        commands.append(["merge", shown(Path(base)), shown(adapter), merged])
    elif is_ours:  # export finds a base of the hub in the cache, and builds an output layer that a base has not
        commands.append(["export", source, merged, "--format", "merged"])
    commands.append(["export", source, shown(folder / "exported")])
    return [_line(command) for command in commands]


def shown(path: Path) -> str:
    """A path as a user types it: relative if it is in the working folder, else absolute."""
    full = os.path.abspath(path)
    inside = os.path.relpath(full)
    return full if inside.startswith(os.pardir) else inside


def _line(command: list[str]) -> str:
    return shlex.join(["lightning-lora", *command])
