"""Writing a merged model as a folder that other software loads without knowing of adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lora.errors import AdapterStateError
from lightning_lora.files.atomic import atomic_folder
from lightning_lora.files.safetensors_file import write_tensors
from lightning_lora.lora.layers.adapted import join, lora_layers
from lightning_lora.lora.layers.base import is_factor
from lightning_lora.lora.layers.quantised_linear import LoRAQuantisedLinear
from lightning_lora.lora.layers.quantised_weights import (
    dequantised,
    dtype_before,
    is_quantised,
    quantised_layers,
    scale_keys,
)
from lightning_lora.lora.merged_saving import apart
from lightning_lora.lora.merging import check_not_merged, merge_layers, unmerge_lora
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.targets.roles import hugging_face_models

_WEIGHT_FILE = "model.safetensors"


def save_merged(module: nn.Module, path: str | Path, tokenizer: Any = None) -> Path:
    """Write ``module`` with its updates folded in; ``module`` itself is left as it was, bit for bit.

    A Hugging Face model inside ``module`` that holds all adapters is written by its own ``save_pretrained``, so
    ``from_pretrained`` loads the folder. Any other module is written as one safetensors file of its state dict. An
    older merged model at ``path`` is replaced in one step.

    All weights of a quantised model are written as plain weights, so that it loads without the library that quantised
    it: a Hugging Face model in its own type, any other in the types its weights had before.

    Args:
        module: An adapted module, not merged, not sharded.
        path: The folder to write.
        tokenizer: A tokenizer to write beside the weights, if given.

    Raises:
        ConfigError: If nothing is adapted, the updates are merged already, or ``path`` is the base's own folder.
        AlreadyShardedError: If the weights are sharded.
        AdapterFileError: If ``path`` holds something other than a merged model.
    """
    check_not_merged(module, "write the merged model")
    model = _model_with_all_adapters(module)
    check_not_the_base(model, Path(path))
    num_quantised = len(quantised_layers(module))
    merge_layers(module)
    try:
        with atomic_folder(path, replaces="config.json" if model is not None else _WEIGHT_FILE) as folder:
            _write_weights(folder, module, model)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    finally:
        unmerge_lora(module)
    if num_quantised:
        files = Path(path).glob("*.safetensors")
        warnings.warn(
            f"the merged model is not quantised: {num_quantised} quantised layers were written to {path} in the type "
            f"they had before, {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB in all.",
            stacklevel=2,
        )
    return Path(path)


def _write_weights(folder: Path, module: nn.Module, model: Any) -> None:
    if model is not None:
        with _not_quantised(model):
            model.save_pretrained(folder, state_dict=apart(_plain_state(model, model.dtype), model))
        return
    state = _plain_state(module)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    write_tensors(folder / _WEIGHT_FILE, state.items(), layout, {"format": "pt"})


def check_not_the_base(model: Any, path: Path) -> None:
    """Raise `ConfigError` if ``path`` is the folder that a Hugging Face model was loaded from."""
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    if base and Path(base).is_dir() and Path(base).resolve() == path.resolve():
        raise AdapterStateError(f"{path} is the folder the base was loaded from; the base is never written to.")


def _model_with_all_adapters(module: nn.Module) -> Any:
    """The Hugging Face model inside ``module`` that holds all its adapters, or None."""
    count = len(lora_layers(module))
    return next((model for _, model in hugging_face_models(module) if len(lora_layers(model)) == count), None)


def _plain_state(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The state dict of a merged ``module`` without adapters, and without anything quantised.

    Args:
        dtype: Type of the weights that are or were quantised. None: the type each had before.
    """
    state = {plain_name(name): value for name, value in module.state_dict().items()}
    state = {name: value for name, value in state.items() if not is_factor(name)}
    for name, layer in module.named_modules():
        weight: Any = layer._parameters.get("weight")
        if is_quantised(weight):
            for key in scale_keys(layer):
                del state[plain_name(join(name, key))]
            value = dequantised(layer).to(dtype or dtype_before(weight))
        elif isinstance(layer, LoRAQuantisedLinear):
            value = weight.detach().to(dtype or weight.dtype)
        else:
            continue
        # transformers quantises GPT-2's transposed linears as ordinary ones, and keeps their old class.
        was_transposed = getattr(getattr(layer, "source_cls", None), "__name__", "") == "Conv1D"
        state[plain_name(join(name, "weight"))] = value.T.contiguous() if was_transposed else value
    return state


@contextmanager
def _not_quantised(model: Any) -> Iterator[None]:
    """Let transformers take ``model`` for a model that was never quantised, within the context."""
    holders = {"hf_quantizer": model, "quantization_config": model.config}
    taken = {name: holder.__dict__.pop(name) for name, holder in holders.items() if name in holder.__dict__}
    try:
        yield
    finally:
        for name, value in taken.items():
            setattr(holders[name], name, value)
