"""PEFT's adapter format: its file names, its config keys and its tensor names, and nothing else.

A tensor is called ``base_model.model.<module>.lora_A.weight`` there and ``<module>.lora_A`` here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError, first_five
from lightning_lora.files.adapter import peft_experts, peft_layers
from lightning_lora.files.adapter.peft_patterns import PatternTable, endings
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import adapted_weights, factor_name, following_layers, join, lora_layers
from lightning_lora.lora.layers.base import FACTORS, LoRALayer, is_factor
from lightning_lora.lora.layers.embedding import LoRAEmbedding
from lightning_lora.lora.layers.experts import LoRAFusedExperts
from lightning_lora.lora.layers.linear import LoRAConv1D
from lightning_lora.lora.layers.shared_factors import own_factors
from lightning_lora.lora.patterns import plain_name

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Readers choose the layout of fused experts by this version.
FORMAT_VERSION = "0.21.0"

_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_LEAVES = dict(zip(_LINEAR + _EMBEDDING, FACTORS * 2, strict=True))
_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "auto_mapping": None,
    "bias": "none",
    "ensure_weight_tying": False,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "revision": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
}
# Settings that change what the tensors mean; an adapter that uses one is refused rather than loaded wrongly.
_UNSUPPORTED = {
    "alora_invocation_tokens": (None,),
    "bias": ("none",),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "megatron_config": (None,),
    "trainable_token_indices": (None,),
    "use_bdlora": (False, None),
    "use_dora": (False,),
    "use_qalora": (False,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
_OLD_EXPERT_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


def to_tensors(root: nn.Module, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors by the names, and in the layouts, that PEFT gives them; what it cannot express keeps our name.

    PEFT shares no factors: a layer that follows another one gets copies.
    """
    weights = adapted_weights(root)
    tensors = {
        PREFIX + join(name, leaf): tensor.contiguous()
        for name, layer in following_layers(root).items()
        for leaf, tensor in zip(_leaves(layer), own_factors(layer), strict=True)
    }
    modules, attentions = peft_experts.modules_of(weights), peft_layers.packed_attentions(root)
    for name, (layer, weight) in weights.items():
        pair = [factors[factor_name(name, layer, weight, factor)] for factor in FACTORS]
        if isinstance(layer, LoRAFusedExperts):
            module, leaves = modules[name], _LINEAR
            pair = list(peft_experts.pack(pair[0], pair[1], layer, weight))
        elif layer.lora_prefix(weight):
            module, leaves = name.removesuffix(f".{weight}"), [f"{weight}_{factor}" for factor in FACTORS]
        else:
            module, leaves = peft_layers.module_of(name, attentions), _leaves(layer)
            pair = peft_layers.pack(pair[0], pair[1], name, layer, weights, attentions)
        tensors |= {PREFIX + join(module, leaf): tensor for leaf, tensor in zip(leaves, pair, strict=True)}
    fillers = peft_layers.missing_projections(weights, attentions, factors)
    return tensors | {PREFIX + name: tensor for name, tensor in fillers.items()}


def _leaves(layer: LoRALayer) -> tuple[str, str]:
    return _EMBEDDING if isinstance(layer, LoRAEmbedding) else _LINEAR


def split_tensor_name(name: str) -> tuple[str, str | None]:
    """``(module, name of the factor there)`` for a factor, ``(parameter, None)`` for a module stored whole.

    Raises:
        AdapterFileError: If the name lacks PEFT's prefix.
    """
    if not name.startswith(PREFIX):
        raise AdapterFileError(
            f"tensor {name!r} does not start with {PREFIX!r}: the file was not written by PEFT, or its names were "
            f"changed afterwards."
        )
    inner = name.removeprefix(PREFIX)
    for leaf, factor in _LEAVES.items():
        if inner == leaf or inner.endswith(f".{leaf}"):
            return inner.removesuffix(leaf).removesuffix("."), factor
    if is_factor(inner):
        module, _, factor = inner.rpartition(".")
        return module, factor
    return inner, None


def table_of(name: str) -> str | None:
    """The adapted embedding a tensor belongs to, or None: its update is stored transposed."""
    module, _, leaf = name.removeprefix(PREFIX).rpartition(".")
    return module if leaf.startswith("lora_embedding_") else None


def to_peft(root: nn.Module, weights: Mapping[str, tuple[LoRALayer, str]], trained: Collection[str]) -> dict[str, Any]:
    """The contents of ``adapter_config.json`` for the adapted weights of ``root``."""
    attentions = peft_layers.packed_attentions(root)
    own = {name: layer.lora_specs[weight] for name, (layer, weight) in weights.items()}
    # Where both projections of an attention are adapted, the attention speaks for both.
    specs = {peft_layers.target_of(name, attentions): spec for name, spec in own.items()}
    specs |= {name: spec for name, spec in own.items() if name in specs}
    fused = [name for name, (layer, _) in weights.items() if isinstance(layer, LoRAFusedExperts)]
    layers = {
        peft_layers.target_of(name, attentions): layer
        for name, layer in lora_layers(root).items()
        if not isinstance(layer, LoRAFusedExperts)
    }
    # In models with fused experts PEFT takes these names for the experts' of older versions; as parameters it does not.
    clashing = dict.fromkeys(name for name in layers if fused and name.rpartition(".")[2] in _OLD_EXPERT_NAMES)
    named = [name for name in layers if name not in clashing]
    config = next(iter(specs.values())).config
    rank, alpha = (
        _most_common(spec.rank for spec in specs.values()),
        _most_common(spec.alpha for spec in specs.values()),
    )
    return _DEFAULTS | {
        "alpha_pattern": _value_patterns({name: _number(spec.alpha) for name, spec in specs.items()}, alpha, clashing),
        "base_model_name_or_path": getattr(getattr(root, "config", None), "_name_or_path", None) or None,
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
        "lora_alpha": _number(alpha),
        # PEFT's experts refuse dropout; it plays no part outside training, and the manifest keeps it.
        "lora_dropout": 0.0 if fused else config.dropout,
        "modules_to_save": sorted(trained) or None,
        "peft_version": FORMAT_VERSION,
        "r": rank,
        "rank_pattern": _value_patterns({name: spec.rank for name, spec in specs.items()}, rank, clashing),
        "target_modules": _target_modules(root, named) if named else [],
        "target_parameters": sorted(fused + [f"{name}.weight" for name in clashing]) or None,
        "task_type": _task_type(root, trained),
        "use_rslora": config.scaling == "rslora",
    }


def check_supported(peft: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter whose settings mean something this package does not compute.

    Raises:
        AdapterFileError: Naming the settings.
    """
    if peft.get("peft_type") != "LORA":
        raise AdapterFileError(f"{where} is of type {peft.get('peft_type')!r}; only LORA adapters can be loaded.")
    unsupported = [
        f"{key}={peft[key]!r}" for key, plain in _UNSUPPORTED.items() if key in peft and peft[key] not in plain
    ]
    if peft.get("init_lora_weights", True) not in _PLAIN_INITS:
        # These change the base weights; the tensors alone do not give the trained model back.
        unsupported.append(f"init_lora_weights={peft['init_lora_weights']!r}")
    if unsupported:
        raise AdapterFileError(
            f"{where} uses {', '.join(unsupported)}, which is not supported. Convert it to a plain LoRA with PEFT."
        )


def to_lora_config(peft: Mapping[str, Any], layer_ranks: Mapping[str, int], trained: Iterable[str]) -> LoRAConfig:
    """The settings a PEFT config and its tensors stand for; layers are named in full."""
    rank, alpha = peft.get("r", 8), peft.get("lora_alpha", 8)
    table = PatternTable(peft.get("alpha_pattern") or {})
    alphas = {name: float(table.value(name, alpha)) for name in layer_ranks}
    return LoRAConfig(
        rank=rank,
        alpha=float(alpha),
        targets=list(layer_ranks),
        rank_pattern={name: layer_rank for name, layer_rank in layer_ranks.items() if layer_rank != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        dropout=float(peft.get("lora_dropout", 0.0)),
        scaling="rslora" if peft.get("use_rslora") else "standard",
        trainable=tuple(trained),
    )


def check_ranks(peft: Mapping[str, Any], layer_ranks: Mapping[str, int], where: str) -> None:
    """Refuse a file whose tensors have another rank than its config says.

    Raises:
        AdapterFileError: Naming the first five layers.
    """
    table = PatternTable(peft.get("rank_pattern") or {})
    expected = {name: table.value(name, peft.get("r", 8)) for name in layer_ranks}
    wrong = [f"{name} has {rank}, not {expected[name]}" for name, rank in layer_ranks.items() if rank != expected[name]]
    if wrong:
        raise AdapterFileError(f"{where}: tensors and config disagree about the rank: {first_five(wrong)}.")


def check_scales(peft: Mapping[str, Any], alphas: Mapping[str, float], config: LoRAConfig, where: str) -> None:
    """Refuse a folder whose manifest says another scale than its PEFT config: one of them was edited.

    Raises:
        AdapterFileError: Naming the first five layers.
    """
    table = PatternTable(peft.get("alpha_pattern") or {})
    expected = {name: table.value(name, peft.get("lora_alpha", 8)) for name in alphas}
    wrong = [f"{name} has {alpha}, not {expected[name]}" for name, alpha in alphas.items() if alpha != expected[name]]
    if bool(peft.get("use_rslora")) != (config.scaling == "rslora"):
        wrong.append(f"use_rslora is {peft.get('use_rslora')}, scaling {config.scaling}")
    if wrong:
        raise AdapterFileError(f"{where}: manifest and config disagree about alpha: {first_five(wrong)}.")


def _value_patterns(values: Mapping[str, Any], default: Any, parameters: Collection[str]) -> dict[str, Any]:
    """Full name to value where it is not the default; anchored where it also ends a layer's name of another value.

    PEFT looks for layers in ``parameters`` by the names of their weights.
    """
    # Every end of a name -> the values of the layers that have it.
    ending_values: dict[str, set[Any]] = {}
    for name, value in values.items():
        for ending in islice(endings(name), 1, None):
            ending_values.setdefault(ending, set()).add(value)
    table = {}
    for name, value in values.items():
        if value != default:
            clash = ending_values.get(name, set()) - {value}
            key = f"^{re.escape(name)}" if clash else name
            table[rf"{re.escape(name)}(\.weight)?" if name in parameters else key] = value
    return table


def _target_modules(root: nn.Module, names: list[str]) -> list[str] | str:
    """The shortest list that means exactly these layers: leaf names if they hit nothing else, else full names.

    A regular expression where a full name also ends the name of a layer left alone: PEFT would adapt that one too.
    """
    leaves = sorted({name.rpartition(".")[2] for name in names})
    every = {plain_name(name) for name, _ in root.named_modules()}
    if {name for name in every if name.rpartition(".")[2] in leaves} == set(names):
        return leaves
    wanted = set(names)
    clash = any(
        name.split(".", start)[-1] in wanted for name in every - wanted for start in range(1, name.count(".") + 1)
    )
    return "|".join(map(re.escape, sorted(names))) if clash else sorted(names)


def _task_type(root: nn.Module, trained: Collection[str]) -> str | None:
    kind = type(root).__name__
    for ending, task in (
        ("ForCausalLM", "CAUSAL_LM"),
        ("LMHeadModel", "CAUSAL_LM"),
        ("SequenceClassification", "SEQ_CLS"),
    ):
        if kind.endswith(ending):
            # PEFT takes the head of a classifier for trained, and fails without its tensors.
            return task if task != "SEQ_CLS" or trained else None
    return None


def _most_common(values: Iterable[Any]) -> Any:
    values = list(values)
    return max(dict.fromkeys(values), key=values.count)


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
