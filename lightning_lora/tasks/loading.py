"""Config and weights of a pretrained transformers model, with short errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from lightning_lora.errors import TaskSettingError, check_choice, first_five, first_line
from lightning_lora.hub import offline_hint, prepare_hub
from lightning_lora.lora.targets.roles import module_roles
from lightning_lora.tasks.attention.implementation import unusable_attention

if TYPE_CHECKING:  # the module imports torchao, bitsandbytes and peft
    from transformers import PreTrainedModel

BASE_DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(name: str | None) -> None:
    """Raise `ConfigError` if a type of base weights is neither None nor one of `BASE_DTYPES`."""
    if name is not None:
        check_choice("dtype", name, BASE_DTYPES)


def read_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """Read the config of a model, without its weights.

    Args:
        name: Folder of a model on this machine, or its hub name.
        overrides: Entries of the config to replace.

    Raises:
        ConfigError: If there is no such folder, or no model of that name.
    """
    # A hub name is "name" or "owner/name"; a name of any other shape can only be a path.
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise TaskSettingError(f"model {name!r} is not a folder on this machine.")
    if Path(name).is_file():
        raise TaskSettingError(
            f"model {name!r} is a file; give the folder of a model, with config.json and its weights."
        )
    prepare_hub(name)
    try:
        return AutoConfig.from_pretrained(name, **overrides)
    except (OSError, ValueError) as error:
        raise TaskSettingError(
            f"model {name!r} cannot be used: {first_line(error)} Give a folder with config.json and safetensors "
            f"weights, or a hub name.{offline_hint(name)}"
        ) from error


def read_tokenizer(name: str) -> Any:
    """Read the tokenizer beside a model.

    Raises:
        ConfigError: If there is none that can be used.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # missing files, a missing library, a tokenizer that needs its author's code
        raise TaskSettingError(f"there is no usable tokenizer beside model {name!r}: {first_line(error)}") from error


def context_length(config: PreTrainedConfig) -> int | None:
    """The most positions that a model was made for, scaled positions included; None if its config sets no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None:
        return None
    given = getattr(text, "rope_parameters", None) or {}
    # One setting for all layers, or one for each type of layer.
    scalings = [given, *(value for value in given.values() if isinstance(value, Mapping))]
    scaled = [
        float(scaling["factor"]) * (scaling.get("original_max_position_embeddings") or limit)
        for scaling in scalings
        if scaling.get("factor")
    ]
    return int(max([limit, *scaled]))


def load_model(auto_class: Any, name: str, *, new_head: bool, **arguments: Any) -> PreTrainedModel:
    """Load a model with its weights, from safetensors files only.

    Args:
        auto_class: The transformers class that loads it, such as ``AutoModelForCausalLM``.
        name: Folder of a model on this machine, or its hub name.
        new_head: Whether the output layer may be missing from the files, and is then random.
        arguments: Further arguments of ``from_pretrained``.

    Raises:
        ConfigError: If the weights cannot be read or are incomplete, or attention cannot be computed as asked.
    """
    try:
        model, loading = auto_class.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except (OSError, SafetensorError) as error:
        raise TaskSettingError(
            f"the weights of {name!r} cannot be read: {first_line(error).rstrip('.')}. Only safetensors files are "
            "loaded."
        ) from error
    except (ImportError, ValueError) as error:
        if "attn_implementation" not in arguments:
            raise
        raise unusable_attention(arguments["attn_implementation"], error) from error
    if wrong := sorted(f"{key}: {tuple(found)}, not {tuple(made)}" for key, found, made in loading["mismatched_keys"]):
        raise TaskSettingError(
            f"{len(wrong)} weights of {name!r} have other shapes than its config.json says ({first_five(wrong)}): copy "
            "both files again from one place."
        )
    _check_complete(model, name, loading["missing_keys"], new_head)
    return model


def head_names(model: nn.Module) -> list[str]:
    """Dotted names of the output layers of a model."""
    return [name for name, role in module_roles(model).items() if role == "head"]


def _check_complete(model: PreTrainedModel, name: str, missing: Iterable[str], new_head: bool) -> None:
    """Refuse missing weights: transformers fills them with random numbers and only logs it."""
    heads = tuple(f"{head}." for head in head_names(model))
    lost = sorted(weight for weight in missing if not (new_head and weight.startswith(heads)))
    if lost:
        raise TaskSettingError(
            f"{name!r} lacks {len(lost)} weights of a {type(model).__name__} ({first_five(lost)}); they would be "
            f"random."
        )
