"""Contents of an adapter-only Lightning checkpoint: what is kept when saving, and what is checked when loading."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_lora.checkpoints.shards import writes_shards
from lightning_lora.checkpoints.wrapped_names import STATE_KEYS
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

_FORMAT = 1
_FIELDS = {"format", "config", "tensors", "base_fingerprint"}


def keep_adapters_only(module: LightningModule, checkpoint: dict[str, Any], base_fingerprint: str | None) -> None:
    """Remove the frozen weights from ``checkpoint`` and add a manifest of the adapters.

    Buffers are kept: they are small, and some (running statistics) change in training. A checkpoint in shards keeps
    all weights and only gets the manifest, because its loader asks for every parameter of the module.
    """
    check_not_merged(module, "save a checkpoint")
    frozen, is_sharded = _frozen_names(module), writes_shards(module.trainer.strategy)
    for key in () if is_sharded else STATE_KEYS:
        if key in checkpoint:
            checkpoint[key] = {name: value for name, value in checkpoint[key].items() if name not in frozen}
    specs = {name: layer.lora_specs[weight] for name, (layer, weight) in adapted_weights(module).items()}
    # Shapes come from the state dict, which only the writing rank has: FSDP1 leaves shards in the module.
    trained = {name: checkpoint["state_dict"].get(name, p) for name, p in _trained_parameters(module).items()}
    checkpoint[CHECKPOINT_KEY] = {
        "format": _FORMAT,
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        "config": next(iter(specs.values())).config.to_dict(),
        "roles": {name: spec.role for name, spec in specs.items()},
        "alphas": {name: spec.alpha for name, spec in specs.items()},
        "tensors": {name: list(tensor.shape) for name, tensor in trained.items()},
        "base_fingerprint": base_fingerprint,
        "siblings": sibling_names(module),
    }
    if is_sharded:
        checkpoint[CHECKPOINT_KEY]["frozen"] = sorted(frozen)


def plain_hyperparameters(checkpoint: dict[str, Any]) -> None:
    """Replace LoRA settings in hyperparameters by plain types, so that the file loads under ``weights_only=True``."""
    for key in (LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, "datamodule_hyper_parameters"):
        hparams = checkpoint.get(key)
        if isinstance(hparams, Mapping):
            checkpoint[key] = plain_settings(dict(hparams))


def plain_settings(hparams: Hyperparameters) -> Hyperparameters:
    """Replace every `LoRAConfig` in ``hparams`` by a mapping, in place."""
    for name, value in hparams.items():
        if isinstance(value, LoRAConfig):
            hparams[name] = value.to_dict()
    return hparams


def check_and_complete(
    module: LightningModule, checkpoint: dict[str, Any], base_fingerprint: str | None, allow_other_base: bool
) -> None:
    """Check a loaded checkpoint against the adapted ``module``, then add the module's frozen weights to it.

    Args:
        module: The adapted module that will load the checkpoint.
        checkpoint: The loaded checkpoint; modified in place.
        base_fingerprint: Fingerprint of the module's base, or None if unknown.
        allow_other_base: Whether the adapters may have been trained on another base.

    Raises:
        AdapterFileError: If the checkpoint holds no adapter, or other names or shapes than ``module``.
        BaseMismatchError: If the adapters were trained on other base weights.
    """
    manifest = _manifest(checkpoint)
    # FSDP1 has already checked the shapes of the parameters that it has flattened.
    expected = {
        name: _shaped(manifest["tensors"].get(name, ())) if is_flattened(parameter) else parameter
        for name, parameter in _trained_parameters(module).items()
    }
    check_tensors(expected, {name: _shaped(shape) for name, shape in manifest["tensors"].items()})
    if not allow_other_base:
        _check_base(base_fingerprint, manifest["base_fingerprint"])
    restore_siblings(module, manifest.get("siblings", {}))
    frozen, scales = _frozen_names(module), _scale_names(module)
    for key in STATE_KEYS:
        # Sharded strategies load the weights themselves: their checkpoint has no state dict here.
        if key in checkpoint:
            # Frozen weights are always the module's own, even if the file holds some.
            state = {name: value for name, value in checkpoint[key].items() if name not in frozen}
            check_tensors(expected, {name: value for name, value in state.items() if name in manifest["tensors"]})
            # Strict loading does not need scales, and bitsandbytes refuses them for 8-bit layers that have computed.
            own = {name: value for name, value in module.state_dict().items() if name not in scales}
            checkpoint[key] = own | state


def refuse_adapter(checkpoint: Mapping[str, Any]) -> None:
    """Raise `AdapterFileError` if an adapter-only checkpoint is loaded into a module without LoRA."""
    if CHECKPOINT_KEY in checkpoint:
        raise AdapterFileError(
            "this checkpoint holds a LoRA adapter only, but the module has lora=None: give it the same lora settings, "
            f"{checkpoint[CHECKPOINT_KEY]['config']}."
        )


def _manifest(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    manifest = checkpoint.get(CHECKPOINT_KEY)
    if manifest is None:
        raise AdapterFileError(
            "this checkpoint holds no adapter (a full fine-tuning run, or one without lightning-lora), but the module "
            "has one. Load it with lora=None."
        )
    missing = sorted(_FIELDS - manifest.keys()) if isinstance(manifest, dict) else None
    if missing or not isinstance(manifest, dict):
        fault = f"it lacks {', '.join(missing)}" if missing else f"it is a {type(manifest).__name__}, not a mapping"
        raise AdapterFileError(f"the checkpoint's {CHECKPOINT_KEY!r} entry is damaged: {fault}. Load another file.")
    if manifest["format"] > _FORMAT:
        raise AdapterFileError(
            f"checkpoint format {manifest['format']} is newer than {_FORMAT}: update lightning-lora."
        )
    return manifest


def _check_base(own: str | None, trained_on: str | None) -> None:
    # A base without values in memory has no fingerprint.
    if None not in (own, trained_on) and own != trained_on:
        raise BaseMismatchError(
            f"this checkpoint was trained on a base with fingerprint {trained_on}, the module's base has {own}. Load "
            "the right base, or set lora_allow_other_base = True on the module (--allow_other_base true on the command "
            "line)."
        )


def _shaped(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), device="meta")


def _trained_parameters(module: LightningModule) -> dict[str, Tensor]:
    """Trained parameters by their names in the state dict."""
    return {
        state_dict_name(name): parameter for name, parameter in module.named_parameters() if parameter.requires_grad
    }


def _frozen_names(module: LightningModule) -> set[str]:
    """State-dict names of everything that checkpoints leave out."""
    named = module.named_parameters(remove_duplicate=False)
    return {state_dict_name(name) for name, p in named if not p.requires_grad} | _scale_names(module)


def _scale_names(module: LightningModule) -> set[str]:
    """State-dict names of entries that belong to quantised weights without being parameters."""
    return {f"{name}.{key}" for name, layer in quantised_layers(module).items() for key in scale_keys(layer)}
