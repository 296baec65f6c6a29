"""Adapter-only Lightning checkpoints: what is kept of a checkpoint dictionary, and what is checked on the way back."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_lora.errors import AdapterFileError, BaseMismatchError
from lightning_lora.files.lightning_checkpoint import CHECKPOINT_KEY
from lightning_lora.lora.adapter import check_not_merged, check_tensors
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import adapted_weights
from lightning_lora.lora.layers.quantised_weights import quantised_layers, scale_keys
from lightning_lora.lora.layers.siblings import restore_siblings, sibling_names
from lightning_lora.lora.patterns import state_dict_name
from lightning_lora.lora.shards import is_flattened

Hyperparameters = TypeVar("Hyperparameters", bound=MutableMapping[str, Any])

FORMAT = 1
_FIELDS = {"format", "config", "tensors", "base_fingerprint"}
# `WeightAveraging` keeps a second copy of the weights under its own key.
_STATES = ("state_dict", "current_model_state")


def keep_adapters_only(module: LightningModule, checkpoint: dict[str, Any], base_fingerprint: str | None) -> None:
    """Drop the frozen weights from ``checkpoint`` and add the manifest.

    Buffers stay: they are small, and some (running statistics) change in training. A checkpoint in shards stays whole
    and gets the manifest only: its loader asks for every parameter of the module.
    """
    check_not_merged(module, "save a checkpoint")
    frozen, is_whole = _frozen(module), in_shards(module.trainer.strategy)
    for key in () if is_whole else _STATES:
        if key in checkpoint:
            checkpoint[key] = {name: value for name, value in checkpoint[key].items() if name not in frozen}
    specs = {name: layer.lora_specs[weight] for name, (layer, weight) in adapted_weights(module).items()}
    checkpoint[CHECKPOINT_KEY] = {
        "format": FORMAT,
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        "config": next(iter(specs.values())).config.to_dict(),
        "roles": {name: spec.role for name, spec in specs.items()},
        "alphas": {name: spec.alpha for name, spec in specs.items()},
        # Whole in the state dict, which only the rank that writes has; FSDP1 leaves pieces in the module.
        "tensors": {name: list(checkpoint["state_dict"].get(name, p).shape) for name, p in _kept(module).items()},
        "base_fingerprint": base_fingerprint,
        "siblings": sibling_names(module),
    }
    if is_whole:
        checkpoint[CHECKPOINT_KEY]["frozen"] = sorted(frozen)


def plain_hyperparameters(checkpoint: dict[str, Any]) -> None:
    """Store LoRA settings as plain types: an object would make the file unreadable under ``weights_only=True``."""
    for key in (LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, "datamodule_hyper_parameters"):
        hparams = checkpoint.get(key)
        if isinstance(hparams, Mapping):
            checkpoint[key] = plain_settings(dict(hparams))


def plain_settings(hparams: Hyperparameters) -> Hyperparameters:
    """``hparams`` itself, with every `LoRAConfig` in it replaced by a mapping."""
    for name, value in hparams.items():
        if isinstance(value, LoRAConfig):
            hparams[name] = value.to_dict()
    return hparams


def verify_and_complete(
    module: LightningModule, checkpoint: dict[str, Any], base_fingerprint: str | None, allow_other_base: bool
) -> None:
    """Check a loaded checkpoint against the adapted ``module``, then fill in the frozen weights from it.

    Raises:
        AdapterFileError: If the checkpoint is not an adapter's, or its names or shapes differ.
        BaseMismatchError: If it was trained on other base weights.
    """
    manifest = checkpoint.get(CHECKPOINT_KEY)
    if manifest is None:
        raise AdapterFileError(
            "this checkpoint holds no adapter (a full fine-tuning run, or one without lightning-lora), but the module "
            "has one. Load it with lora=None."
        )
    if not isinstance(manifest, dict) or not manifest.keys() >= _FIELDS:
        raise AdapterFileError(f"the checkpoint's {CHECKPOINT_KEY!r} entry is no manifest: it lacks {sorted(_FIELDS)}.")
    if manifest["format"] > FORMAT:
        raise AdapterFileError(f"checkpoint format {manifest['format']} is newer than {FORMAT}: update lightning-lora.")
    # The shape of what FSDP1 has flattened was checked by FSDP1.
    expected = {
        name: _shaped(manifest["tensors"].get(name, ())) if is_flattened(parameter) else parameter
        for name, parameter in _kept(module).items()
    }
    check_tensors(expected, {name: _shaped(shape) for name, shape in manifest["tensors"].items()})
    trained_on = manifest["base_fingerprint"]
    # Either may be unknown: a base without memory has no fingerprint.
    if not allow_other_base and None not in (base_fingerprint, trained_on) and base_fingerprint != trained_on:
        raise BaseMismatchError(
            f"this checkpoint was trained on a base with fingerprint {trained_on}, the module's base has "
            f"{base_fingerprint}. Load the right base, or set lora_allow_other_base = True on the module "
            f"(--allow_other_base true on the command line)."
        )
    restore_siblings(module, manifest.get("siblings", {}))
    # The base is the module's own, whatever the file holds.
    base = _frozen(module)
    for key in _STATES:
        # Sharded strategies load the weights themselves and pass no state here.
        if key in checkpoint:
            state = {name: value for name, value in checkpoint[key].items() if name not in base}
            check_tensors(expected, {name: value for name, value in state.items() if name in manifest["tensors"]})
            # A strict load does not ask for scales, and bitsandbytes refuses those of 8-bit layers that have computed.
            scales = _scales(module)
            own = {name: value for name, value in module.state_dict().items() if name not in scales}
            checkpoint[key] = own | state


def refuse_adapter(checkpoint: Mapping[str, Any]) -> None:
    """Raise `AdapterFileError` if an adapter-only checkpoint is loaded into a module without LoRA."""
    if CHECKPOINT_KEY in checkpoint:
        raise AdapterFileError(
            "this checkpoint holds a LoRA adapter only, but the module has lora=None: give it the same lora settings, "
            f"{checkpoint[CHECKPOINT_KEY]['config']}."
        )


def _shaped(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), device="meta")


def _kept(module: LightningModule) -> dict[str, Tensor]:
    return {state_dict_name(name): p for name, p in module.named_parameters() if p.requires_grad}


def _frozen(module: LightningModule) -> set[str]:
    named = module.named_parameters(remove_duplicate=False)
    return {state_dict_name(name) for name, p in named if not p.requires_grad} | _scales(module)


def _scales(module: LightningModule) -> set[str]:
    """Entries of the state dict that belong to quantised weights and are no parameters."""
    return {f"{name}.{key}" for name, layer in quantised_layers(module).items() for key in scale_keys(layer)}


def in_shards(strategy: Strategy) -> bool:
    """Whether ``strategy`` writes a folder of shards. Its setting is private in Lightning, under two names."""
    return getattr(strategy, "_save_distributed_checkpoint", getattr(strategy, "_state_dict_type", "full") == "sharded")
