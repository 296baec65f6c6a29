"""Where the trained model of a run of a study is: its adapter, or the whole model if the study was told to keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from lightning_lora.callbacks.merge_on_fit_end import tokenizer_of
from lightning_lora.data.chat.endings import end_of_turn_ids
from lightning_lora.errors import BenchmarkError
from lightning_lora.files.adapter.peft_format import CONFIG_FILE
from lightning_lora.files.atomic import atomic_folder
from lightning_lora.files.generation_config import add_stops
from lightning_lora.files.merge.merged_model import check_not_the_base
from lightning_lora.lora.targets.roles import hugging_face_models

MODEL = "model"
_ADAPTER = Path("adapters", "last")


def keep_model(module: LightningModule, folder: Path) -> None:
    """Write the trained model of a run without adapters into its folder; with adapters they are there already.

    Raises:
        ConfigError: If the module holds no model of transformers.
    """
    if not (folder / _ADAPTER / CONFIG_FILE).is_file():
        save_whole(module, folder / MODEL)


def save_whole(module: LightningModule, path: Path) -> None:
    """Write the model that a module without adapters has trained, with its tokenizer.

    Args:
        path: The folder to write; an older model there is replaced in one step.

    Raises:
        ConfigError: If the module holds no model of transformers, or ``path`` is the folder that it was read from.
    """
    model: Any = next((model for _, model in hugging_face_models(module)), None)
    if model is None:
        raise BenchmarkError(f"{type(module).__name__} holds no model of transformers, so no model of it can be kept.")
    check_not_the_base(model, path)
    tokenizer = tokenizer_of(module)
    with atomic_folder(path, replaces="config.json") as place:
        model.save_pretrained(place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
            # An adapter says where its answers end; a whole model stops there only if its own config does.
            add_stops(place, end_of_turn_ids(tokenizer) if tokenizer.chat_template else [])


def kept_model(folder: Path) -> Path | None:
    """The adapter folder of a run, or its whole model; None if it has kept neither."""
    if (folder / _ADAPTER / CONFIG_FILE).is_file():
        return folder / _ADAPTER
    return folder / MODEL if (folder / MODEL / "config.json").is_file() else None
