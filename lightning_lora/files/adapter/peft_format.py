"""PEFT's file names and tensor names.

A tensor is called ``base_model.model.<module>.lora_A.weight`` there and ``<module>.lora_A`` here, and a magnitude
``base_model.model.<module>.lora_magnitude_vector``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_lora.errors import AdapterFolderError, first_five
from lightning_lora.files.json_object import read_json
from lightning_lora.lora.layers.base import FACTORS, MAGNITUDE, LoRALayer, is_factor
from lightning_lora.lora.layers.embedding import LoRAEmbedding

FactorPair = tuple[Tensor, Tensor]

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The last parts of the names of the two factors of a layer.
LINEAR_LEAVES = ("lora_A.weight", "lora_B.weight")
MAGNITUDE_LEAF = "lora_magnitude_vector"

# A live PeftModel puts the name of the adapter behind that of a factor, and keeps copies of modules trained in full.
_LIVE_FACTOR = re.compile(
    r"\.(?:(?:lora_[AB]|lora_magnitude_vector)(?=\.[^.]+\.weight$)|lora_embedding_[AB](?=\.[^.]+$))\.([^.]+)"
)
_LIVE_MODULE = re.compile(r"\.modules_to_save\.([^.]+)(?=\.)")

_PARTS = ("base_layer", "original_module", "modules_to_save")
_EMBEDDING_LEAVES = ("lora_embedding_A", "lora_embedding_B")
_FACTOR_OF_LEAF = dict(zip(LINEAR_LEAVES + _EMBEDDING_LEAVES, FACTORS * 2, strict=True))
# The second name is that of a live model's state dict.
_FACTOR_OF_LEAF |= dict.fromkeys((MAGNITUDE_LEAF, f"{MAGNITUDE_LEAF}.weight"), MAGNITUDE)


def recorded_base(folder: Path) -> str | None:
    """The base that an adapter folder names, a folder or a hub name; None if it names none.

    Raises:
        AdapterFileError: If the config is damaged, or its base is no text.
    """
    base = read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise AdapterFolderError(f"{folder / CONFIG_FILE}: base_model_name_or_path must be text, got {base!r}.")
    return base or None


def factor_leaves(layer: LoRALayer) -> tuple[str, str]:
    """The last parts of PEFT's names of the two factors of a layer."""
    return _EMBEDDING_LEAVES if isinstance(layer, LoRAEmbedding) else LINEAR_LEAVES


def split_tensor_name(name: str) -> tuple[str, str | None]:
    """Split PEFT's name of a tensor: ``(module, factor)``, or ``(parameter, None)`` for a module trained in full.

    Raises:
        AdapterFileError: If the name lacks PEFT's prefix.
    """
    if not name.startswith(PREFIX):
        raise AdapterFolderError(
            f"tensor {name!r} does not start with {PREFIX!r}: the file was not written by PEFT, or its names were "
            f"changed afterwards."
        )
    inner = name.removeprefix(PREFIX)
    for leaf, factor in _FACTOR_OF_LEAF.items():
        if inner == leaf or inner.endswith(f".{leaf}"):
            return inner.removesuffix(leaf).removesuffix("."), factor
    if is_factor(inner):
        module, _, factor = inner.rpartition(".")
        return module, factor
    return inner, None


def embedding_of(name: str) -> str | None:
    """The adapted embedding that a tensor of this name belongs to, or None. Its update is stored transposed."""
    module, _, leaf = name.removeprefix(PREFIX).rpartition(".")
    return module if leaf.startswith("lora_embedding_") else None


def without_adapter_name(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Tensors by the names that PEFT's ``save_pretrained`` gives, if they are those of a live model's state dict.

    The base weights in such a state dict are left out. Names of any other file stay as they are.

    Raises:
        AdapterFileError: If they belong to several adapters.
    """
    factors = {name: match[1] for name in tensors if (match := _LIVE_FACTOR.search(name))}
    if not factors:
        return dict(tensors)
    if len(adapters := set(factors.values())) > 1:
        raise AdapterFolderError(
            f"{where} holds {len(adapters)} adapters ({first_five(sorted(adapters))}), and one can be loaded: write it "
            f"with PEFT's save_pretrained."
        )
    (adapter,) = adapters
    modules = [name for name in tensors if (match := _LIVE_MODULE.search(name)) and match[1] == adapter]
    renamed = {name: _LIVE_MODULE.sub("", name, count=1) for name in modules}
    for name in factors:
        start, stop = _LIVE_FACTOR.search(name).span(1)  # pyright: ignore[reportOptionalMemberAccess]
        renamed[name] = name[: start - 1] + name[stop:]
    return {new: tensors[name] for name, new in renamed.items()}


def stored_weight(name: str) -> tuple[str, str]:
    """Split the name of a whole weight: ``(parameter, part of PEFT's layer that holds it)``, often no part.

    PEFT stores all parts of an embedding that was resized: the base of an adapted layer, or of one that is trained in
    full the copy that is trained and the original.

    >>> stored_weight("model.embed_tokens.base_layer.weight"), stored_weight("lm_head.weight")
    (('model.embed_tokens.weight', 'base_layer'), ('lm_head.weight', ''))
    """
    layer, _, leaf = name.rpartition(".")
    module, _, part = layer.rpartition(".")
    return (f"{module}.{leaf}", part) if part in _PARTS else (name, "")
