"""A merged model as a folder that other software loads without knowing of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lightning_lora.adapter import check_not_merged, merge_lora, unmerge_lora
from lightning_lora.atomic import atomic_folder
from lightning_lora.errors import ConfigError
from lightning_lora.layers.base import is_factor
from lightning_lora.layers.walk import lora_layers
from lightning_lora.patterns import plain_name
from lightning_lora.roles import hugging_face_models
from lightning_lora.tensor_files import write_tensors

WEIGHT_FILE = "model.safetensors"


def save_merged(module: nn.Module, path: str | Path, tokenizer: Any = None) -> Path:
    """Write ``module`` with its updates folded in; ``module`` itself is left as it was, bit for bit.

    A Hugging Face model inside ``module`` that holds all adapters is written by its own ``save_pretrained``, so
    ``from_pretrained`` loads the folder. Any other module is written as one safetensors file of its state dict. An
    older merged model at ``path`` is replaced in one step.

    Args:
        module: An adapted module, not merged, not sharded.
        path: The folder to write.
        tokenizer: Written beside the weights if given.

    Raises:
        ConfigError: If nothing is adapted, the updates are merged already, or ``path`` is the base's own folder.
        AlreadyShardedError: If the weights are sharded.
        AdapterFileError: If ``path`` holds something that is no merged model.
    """
    check_not_merged(module, "write the merged model")
    model = _model_with_all_adapters(module)
    _check_not_the_base(model, Path(path))
    merge_lora(module)
    try:
        with atomic_folder(path, replaces="config.json" if model is not None else WEIGHT_FILE) as folder:
            if model is None:
                state = _base_state(module)
                layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
                write_tensors(folder / WEIGHT_FILE, state.items(), layout, {"format": "pt"})
            else:
                model.save_pretrained(folder, state_dict=_base_state(model))
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    finally:
        unmerge_lora(module)
    return Path(path)


def _check_not_the_base(model: Any, path: Path) -> None:
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    if base and Path(base).is_dir() and Path(base).resolve() == path.resolve():
        raise ConfigError(f"{path} is the folder the base was loaded from; the base is never written to.")


def _model_with_all_adapters(module: nn.Module) -> Any:
    count = len(lora_layers(module))
    return next((model for _, model in hugging_face_models(module) if len(lora_layers(model)) == count), None)


def _base_state(module: nn.Module) -> dict[str, Any]:
    state = {plain_name(name): value for name, value in module.state_dict().items()}
    return {name: value for name, value in state.items() if not is_factor(name)}
