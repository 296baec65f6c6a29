"""Adapters for servers that know one alpha: every layer's own scale is folded into its ``B``.

llama.cpp multiplies an update by ``lora_alpha / (rank of the tensor)``, vLLM by ``lora_alpha / r``, or ``lora_alpha /
sqrt(r)`` with rsLoRA, for every layer alike; both read past ``alpha_pattern``. Read in llama.cpp's
``convert_lora_to_gguf.py`` and ``llama-adapter.h``, and vLLM's ``peft_helper.py``. The folder written means the same
function in PEFT.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.errors import AdapterFolderError, first_five
from lightning_lora.files.adapter.folder import AdapterFolder
from lightning_lora.files.adapter.manifest import MANIFEST_FILE
from lightning_lora.files.adapter.peft_format import CONFIG_FILE, TENSOR_FILE, split_tensor_name
from lightning_lora.files.json_object import read_json
from lightning_lora.files.safetensors_file import read_tensors, write_tensors

# The output layer of a causal language model, as the models that llama.cpp reads call it.
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output_layer)$")
# Of vLLM 0.33.0, read on 2026-11-23.
_MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_FULL_MODULES = ("score", "classifier")
_INSTEAD = "Merge first: `lightning-lora export RUN OUT --format merged`, and convert the merged model."


def fold_scales(folder: AdapterFolder, target: str, out: Path) -> int:
    """Rewrite the adapter in ``out``, a copy of ``folder``, so that ``target`` computes with every layer's scale.

    Nothing is written where it does already. Our manifest, which describes other tensors, is taken away otherwise.

    Args:
        target: ``"llama.cpp"`` or ``"vllm"``.

    Returns:
        The number of layers whose ``B`` is another one than in ``folder``.

    Raises:
        AdapterFileError: If weights of fused experts that are stored together have different scales.
    """
    tensors = read_tensors(folder.path / TENSOR_FILE)
    folded = {
        name: (tensor.float() * ratio).contiguous()
        for name, tensor in tensors.items()
        if split_tensor_name(name)[1] == "lora_B" and (ratio := _ratio(folder, target, name)) != 1
    }
    if not folded:
        return 0
    tensors |= folded
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(out / TENSOR_FILE, tensors.items(), layout, {"format": "pt"})
    config = read_json(folder.path / CONFIG_FILE) | {"alpha_pattern": {}}
    if target == "llama.cpp":
        config["use_rslora"] = False
    else:
        # PEFT divides by the layer's own rank, and shall come to the same scale.
        patterns = config.get("rank_pattern") or {}
        config["alpha_pattern"] = {
            key: _scale_in(folder, target, own) * _divisor(config, own) for key, own in patterns.items()
        }
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True))
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    return len(folded)


def _ratio(folder: AdapterFolder, target: str, tensor: str) -> float:
    """The scale of the weight that a stored ``B`` belongs to, relative to the scale in ``target``."""
    module = split_tensor_name(tensor)[0]
    owner = re.sub(r"(\.base_layer)+$", "", module)
    # Fused experts have two weights, and PEFT stores their factors at the module that holds them.
    names = [module] if module in folder.ranks else [n for n in folder.ranks if n.rpartition(".")[0] == owner]
    found = {round(folder.spec(name).scale / _scale_in(folder, target, folder.ranks[name]), 6) for name in names}
    if len(found) > 1:
        raise AdapterFolderError(
            f"{target} multiplies every update by one scale, and the weights of {owner} have several. {_INSTEAD}"
        )
    exact = folder.spec(names[0]).scale / _scale_in(folder, target, folder.ranks[names[0]]) if names else 1.0
    return 1.0 if not names or abs(exact - 1) < 1e-6 else exact


def _scale_in(folder: AdapterFolder, target: str, rank: int) -> float:
    """The scale by which ``target`` multiplies an update of this rank."""
    alpha = float(folder.peft.get("lora_alpha", 8))
    return alpha / rank if target == "llama.cpp" else alpha / _divisor(folder.peft, int(folder.peft.get("r", 8)))


def _divisor(config: Mapping[str, Any], rank: int) -> float:
    return math.sqrt(rank) if config.get("use_rslora") else rank


def check_llama_cpp(folder: AdapterFolder, base: dict[str, Any] | None) -> None:
    """Raise `AdapterFileError` for what llama.cpp drops or misreads.

    Args:
        base: The base model's ``config.json``, or None if it is not at hand.
    """
    reasons = list(_reasons(folder, base))
    if reasons:
        raise AdapterFolderError(f"llama.cpp cannot serve this as an adapter: {'; '.join(reasons)}. {_INSTEAD}")


def _reasons(folder: AdapterFolder, base: dict[str, Any] | None) -> Iterable[str]:
    if folder.config.dora:
        yield "its converter knows no magnitudes (DoRA)"
    norms = sorted(name for name in folder.trained if "norm" in name)
    others = sorted(set(folder.trained) - set(norms))
    if norms:
        yield f"it reads past trained norms without a word ({first_five(norms)})"
    if others:
        yield f"its converter stops at modules trained in full and biases ({first_five(others)})"
    if folder.base_copies:
        yield f"it reads past changed base weights without a word ({first_five(sorted(folder.base_copies))})"
    experts = sorted({*folder.stacked, *(name for name, shape in folder.shapes.items() if shape.num_experts)})
    if experts:
        yield f"its converter knows no adapters of fused experts ({first_five(experts)})"
    kernels = sorted(name for name, tensor in _stored(folder).items() if tensor.ndim > 2)
    if kernels and not experts:
        yield f"its converter knows no convolutions ({first_five(kernels)})"
    if folder.peft.get("fan_in_fan_out"):
        yield "its converter transposes factors of transposed linear layers (fan_in_fan_out)"
    shared = sorted({*folder.embeddings, *folder.manifest.following, *filter(_HEADS.search, folder.ranks)})
    # transformers ties unless a model's config says otherwise.
    if shared and base is None:
        yield f"{first_five(shared)} may share a weight, which the base's config.json would say, and it is not here"
    elif shared and base is not None and base.get("tie_word_embeddings", True):
        yield f"it has one tensor for embedding and output layer, which are tied in the base ({first_five(shared)})"


def _stored(folder: AdapterFolder) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in read_tensors(folder.path / TENSOR_FILE).items() if "lora_" in name}


def vllm_flags(folder: AdapterFolder) -> str:
    """The ``vllm serve`` options this adapter needs.

    Raises:
        AdapterFileError: If vLLM would refuse the adapter.
    """
    if folder.config.dora:
        raise AdapterFolderError("vLLM loads no adapters with magnitudes (DoRA). Export it merged instead.")
    rank = max(folder.ranks.values())
    if rank > _MAX_RANKS[-1]:
        raise AdapterFolderError(f"vLLM serves adapters up to rank {_MAX_RANKS[-1]}, this one has rank {rank}.")
    modules = {name.rpartition(".")[0].rpartition(".")[2] for name in folder.trained}
    refused = sorted(modules - set(_FULL_MODULES))
    if refused or len(modules) > 1:
        raise AdapterFolderError(
            f"vLLM loads at most one module trained in full, {' or '.join(_FULL_MODULES)}; this adapter has "
            f"{first_five(sorted(modules))}. Export it merged instead."
        )
    return f"--enable-lora --max-lora-rank {next(limit for limit in _MAX_RANKS if limit >= rank)}"
