"""PEFT's ``adapter_config.json``: writing it for adapted layers, and reading settings from it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Any

from torch import nn

from lightning_lora.errors import AdapterFolderError, first_five
from lightning_lora.files.adapter.peft_layers import PEFTLayout
from lightning_lora.files.adapter.peft_patterns import PatternTable, endings
from lightning_lora.files.adapter.peft_trained import takes_for_classifier
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import following_layers, lora_layers, other_names
from lightning_lora.lora.layers.base import AdapterSpec
from lightning_lora.lora.layers.experts import LoRAFusedExperts
from lightning_lora.lora.layers.linear import LoRAConv1D
from lightning_lora.lora.layers.matrices import LoRAMatrices
from lightning_lora.lora.patterns import plain_name

# Readers choose the layout of fused experts by this version.
FORMAT_VERSION = "0.21.0"

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
    "use_qalora": (False,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
_OLD_EXPERT_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


def to_peft(layout: PEFTLayout, saved: Collection[str]) -> dict[str, Any]:
    """Describe adapted layers as the contents of ``adapter_config.json``.

    Args:
        saved: Names of the modules for PEFT to save (see `SavedModules`).
    """
    specs = _specs(layout)
    fused = [name for name, (layer, _) in layout.weights.items() if isinstance(layer, LoRAFusedExperts)]
    layers = {
        layout.target(name): layer
        for name, layer in (lora_layers(layout.root) | other_names(layout.root)).items()
        if not isinstance(layer, LoRAFusedExperts)
    }
    # In models with fused experts PEFT takes these names for the experts' of older versions; as parameters it does not.
    # The matrix of a module of an unknown kind, such as a router, is a parameter to PEFT too.
    parameters = {
        name: next(iter(layer.lora_specs))
        for name, layer in layers.items()
        if (fused and name.rpartition(".")[2] in _OLD_EXPERT_NAMES)
        or (isinstance(layer, LoRAMatrices) and hasattr(layer, "lora_A"))
    }
    named = [name for name in layers if name not in parameters]
    config = next(iter(specs.values())).config
    ranks = {name: spec.rank for name, spec in specs.items()}
    alphas = {name: _number(spec.alpha) for name, spec in specs.items()}
    return (
        _DEFAULTS
        | _value_and_pattern("r", "rank_pattern", ranks, parameters)
        | _value_and_pattern("lora_alpha", "alpha_pattern", alphas, parameters)
        | {
            "base_model_name_or_path": getattr(getattr(layout.root, "config", None), "_name_or_path", None) or None,
            "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
            # PEFT's experts refuse dropout. It only acts in training, and the manifest keeps it.
            "lora_dropout": 0.0 if fused or parameters else config.dropout,
            "modules_to_save": sorted(saved) or None,
            "peft_version": FORMAT_VERSION,
            "target_modules": _target_modules(layout.root, named) if named else [],
            "target_parameters": sorted(fused + [".".join(item) for item in parameters.items()]) or None,
            "task_type": _task_type(layout.root, saved),
            "use_dora": config.dora,
            "use_rslora": config.scaling == "rslora",
        }
    )


def _specs(layout: PEFTLayout) -> dict[str, AdapterSpec]:
    """PEFT's target to how it is adapted; layers that share a weight are targets of their own."""
    following = {layout.target(name): layer.lora_spec for name, layer in following_layers(layout.root).items()}
    own = {name: layer.lora_specs[weight] for name, (layer, weight) in layout.weights.items()}
    specs = {layout.target(name): spec for name, spec in own.items()}
    # Where both projections of an attention are adapted, the attention speaks for both.
    return following | specs | {name: spec for name, spec in own.items() if name in specs}


def _value_and_pattern(
    option: str, pattern: str, values: Mapping[str, Any], parameters: Mapping[str, str]
) -> dict[str, Any]:
    """The most common value as ``option``, and the other values as ``pattern``."""
    every = list(values.values())
    default = max(dict.fromkeys(every), key=every.count)
    return {option: default, pattern: _value_patterns(values, default, parameters)}


def check_supported(peft: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter whose settings mean something this package does not compute.

    Raises:
        AdapterFileError: Naming the settings.
    """
    if peft.get("peft_type") != "LORA":
        raise AdapterFolderError(f"{where} is of type {peft.get('peft_type')!r}; only LORA adapters can be loaded.")
    unsupported = [
        f"{key}={peft[key]!r}" for key, plain in _UNSUPPORTED.items() if key in peft and peft[key] not in plain
    ]
    if peft.get("init_lora_weights", True) not in _PLAIN_INITS:
        # These change the base weights; the tensors alone do not give the trained model back.
        unsupported.append(f"init_lora_weights={peft['init_lora_weights']!r}")
    if unsupported:
        raise AdapterFolderError(
            f"{where} uses {', '.join(unsupported)}, which is not supported. Convert it to a plain LoRA with PEFT."
        )


def to_lora_config(peft: Mapping[str, Any], ranks: Mapping[str, int], trained: Iterable[str]) -> LoRAConfig:
    """Convert a PEFT config to our settings, with every layer named in full.

    Args:
        ranks: Adapted weight to the rank of its tensors.
        trained: Names of the modules trained in full.
    """
    rank, alpha = peft.get("r", 8), peft.get("lora_alpha", 8)
    alphas = {name: float(value) for name, value in _values(peft, "lora_alpha", "alpha_pattern", ranks).items()}
    return LoRAConfig(
        rank=rank,
        alpha=float(alpha),
        targets=list(ranks),
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: own for name, own in alphas.items() if own != alpha},
        dropout=float(peft.get("lora_dropout", 0.0)),
        scaling="rslora" if peft.get("use_rslora") else "standard",
        trainable=tuple(trained),
        dora=bool(peft.get("use_dora")),
    )


def with_values_of(peft: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings with rank and alpha of weights that PEFT looks for under other names.

    Args:
        keys: Our name of an adapted weight to the name that PEFT matches with its patterns.
    """
    ranks = _values(peft, "r", "rank_pattern", keys.values())
    alphas = _values(peft, "lora_alpha", "alpha_pattern", keys.values())
    return with_own_values(
        peft, {name: ranks[key] for name, key in keys.items()}, {name: alphas[key] for name, key in keys.items()}
    )


def with_own_values(peft: Mapping[str, Any], ranks: Mapping[str, Any], alphas: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's settings with the given rank and alpha for the weights of exactly these names."""
    extended = dict(peft)
    for pattern, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        own = {f"^{re.escape(name)}": value for name, value in values.items()}
        extended[pattern] = own | {key: value for key, value in (peft.get(pattern) or {}).items() if key not in own}
    return extended


def check_ranks(peft: Mapping[str, Any], ranks: Mapping[str, int], where: str) -> None:
    """Refuse a file whose tensors have another rank than its config says.

    Raises:
        AdapterFileError: Naming the first five layers.
    """
    expected = _values(peft, "r", "rank_pattern", ranks)
    wrong = [f"{name} has {rank}, not {expected[name]}" for name, rank in ranks.items() if rank != expected[name]]
    if wrong:
        raise AdapterFolderError(f"{where}: tensors and config disagree about the rank: {first_five(wrong)}.")


def check_scales(peft: Mapping[str, Any], alphas: Mapping[str, float], config: LoRAConfig, where: str) -> None:
    """Refuse a folder whose manifest gives another scale than its PEFT config: one of them was edited.

    Raises:
        AdapterFileError: Naming the first five layers.
    """
    expected = _values(peft, "lora_alpha", "alpha_pattern", alphas)
    wrong = [f"{name} has {alpha}, not {expected[name]}" for name, alpha in alphas.items() if alpha != expected[name]]
    if bool(peft.get("use_rslora")) != (config.scaling == "rslora"):
        wrong.append(f"use_rslora is {peft.get('use_rslora')}, scaling {config.scaling}")
    if wrong:
        raise AdapterFolderError(f"{where}: manifest and config disagree about alpha: {first_five(wrong)}.")


def _values(peft: Mapping[str, Any], option: str, pattern: str, names: Iterable[str]) -> dict[str, Any]:
    """Layer to its value of ``option``, or of the first key of ``pattern`` that matches its name."""
    table = PatternTable(peft.get(pattern) or {})
    return {name: table.value(name, peft.get(option, 8)) for name in names}


def _value_patterns(values: Mapping[str, Any], default: Any, parameters: Mapping[str, str]) -> dict[str, Any]:
    """Full name to value for every layer whose value is not the default.

    A name that also ends the name of a layer with another value is anchored. PEFT looks for the layers in
    ``parameters`` by the names of their weights, which these give.
    """
    # Every ending of a name -> the values of the layers that have it.
    ending_values: dict[str, set[Any]] = {}
    for name, value in values.items():
        for ending in islice(endings(name), 1, None):
            ending_values.setdefault(ending, set()).add(value)
    table = {}
    for name, value in values.items():
        if value != default:
            clash = ending_values.get(name, set()) - {value}
            key = f"^{re.escape(name)}" if clash else name
            leaf = re.escape(parameters.get(name, ""))
            table[rf"{re.escape(name)}(\.{leaf})?" if leaf else key] = value
    return table


def _target_modules(root: nn.Module, names: list[str]) -> list[str] | str:
    """The shortest list that means exactly these layers: last parts of names if they mean no other, else full names.

    If a full name also ends the name of a layer left alone, PEFT would adapt that layer too. The result is then a
    regular expression.
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


def _task_type(root: nn.Module, saved: Collection[str]) -> str | None:
    """PEFT's word for the task of a Hugging Face model, by the name of its class; None if it is unknown."""
    kind = type(root).__name__
    for ending, task in (
        ("ForCausalLM", "CAUSAL_LM"),
        ("LMHeadModel", "CAUSAL_LM"),
        ("SequenceClassification", "SEQ_CLS"),
    ):
        if kind.endswith(ending):
            return task if task != "SEQ_CLS" or takes_for_classifier(root, saved) else None
    return None


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
