"""Contents of an adapter-only Lightning checkpoint: what is kept when saving, and what is checked when loading."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_lora.checkpoints.grown_ranks import ranks_to_take, taken_shapes
from lightning_lora.checkpoints.shards import writes_shards
from lightning_lora.checkpoints.wrapped_names import STATE_KEYS
from lightning_lora.errors import AdapterFileError, BaseMismatchError, CheckpointFileError, first_five
from lightning_lora.files.lightning_checkpoint import CHECKPOINT_KEY
from lightning_lora.lightning_private import is_trained
from lightning_lora.lora.adapter import check_tensors
from lightning_lora.lora.changed_tensors import changed_tensors
from lightning_lora.lora.config import LoRAConfig, setting_changes
from lightning_lora.lora.fingerprint import WeightPrint, fingerprint, other_weights
from lightning_lora.lora.growth import take_ranks
from lightning_lora.lora.layers.adapted import adapted_weights, factor_parameters
from lightning_lora.lora.layers.quantised_weights import quantised_layers, scale_keys
from lightning_lora.lora.layers.siblings import restore_siblings, sibling_names
from lightning_lora.lora.merging import check_not_merged
from lightning_lora.lora.patterns import plain_name, state_dict_name
from lightning_lora.lora.shards import is_flattened
from lightning_lora.step_memory import StepMemory

BasePrints = Mapping[str, WeightPrint] | None
Hyperparameters = TypeVar("Hyperparameters", bound=MutableMapping[str, Any])

_FORMAT = 1
_FIELDS = {"format", "config", "tensors", "base_fingerprint"}


def keep_adapters_only(module: LightningModule, checkpoint: dict[str, Any], base: BasePrints) -> None:
    """Remove the frozen weights from ``checkpoint`` and add a manifest of the adapters.

    Buffers are kept: they are small, and some (running statistics) change in training. So are weights of a frozen copy
    (a teacher) that are no longer what they were. A checkpoint in shards keeps all weights and only gets the manifest,
    because its loader asks for every parameter of the module.

    Args:
        base: Digests of the module's base by parameter name, or None if unknown.
    """
    check_not_merged(module, "save a checkpoint")
    moved = _moved_parameters(module)
    frozen, is_sharded = _frozen_names(module) - moved.keys(), writes_shards(module.trainer.strategy)
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
        "ranks": {name: spec.rank for name, spec in specs.items()},
        "alphas": {name: spec.alpha for name, spec in specs.items()},
        "tensors": {name: list(tensor.shape) for name, tensor in trained.items()},
        "moved": {name: list(checkpoint["state_dict"].get(name, p).shape) for name, p in moved.items()},
        "base_fingerprint": None if base is None else fingerprint(base),
        "base": {name: found.to_dict() for name, found in (base or {}).items()},
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


class NotGiven:
    """The default of an argument that was not given; Lightning may find it among hyperparameters."""

    def __repr__(self) -> str:
        return "..."


def plain_settings(hparams: Hyperparameters) -> Hyperparameters:
    """Replace settings of this package in ``hparams`` by mappings, and leave out what was not given, in place."""
    for name, value in list(hparams.items()):
        if isinstance(value, (LoRAConfig, StepMemory)):
            hparams[name] = value.to_dict()
        elif isinstance(value, NotGiven):
            del hparams[name]
    return hparams


def check_and_complete(
    module: LightningModule, checkpoint: dict[str, Any], base: BasePrints, allow_other_base: bool
) -> None:
    """Check a loaded checkpoint against the adapted ``module``, then add the module's frozen weights to it.

    The module takes over ranks that have grown in the run of the checkpoint.

    Args:
        base: Prints of the module's base, or None if unknown.

    Raises:
        AdapterFileError: If the checkpoint holds no adapter, or other names or shapes than ``module``.
        BaseMismatchError: If the adapters were trained on other base weights.
    """
    manifest = _manifest(checkpoint)
    moved = manifest.get("moved", {})
    taken = ranks_to_take(module, manifest)
    shapes = taken_shapes(module, taken)
    # FSDP1 has already checked the shapes of the parameters that it has flattened.
    expected = {
        name: _shaped(manifest["tensors"].get(name, ()))
        if is_flattened(parameter)
        else _shaped(shapes.get(id(parameter), parameter.shape))
        for name, parameter in _trained_parameters(module).items()
    }
    _check_adapters(module, manifest, expected, taken)
    own_moved = {
        key: _shaped(moved[key]) if is_flattened(parameter) else parameter
        for name, parameter in module.named_parameters()
        if (key := state_dict_name(name)) in moved
    }
    check_tensors(own_moved, {name: _shaped(shape) for name, shape in moved.items()})
    if not allow_other_base:
        root = f"{prefix}." if (prefix := getattr(module, "lora_root", None)) else ""
        _check_base(base, manifest, {plain_name(name).removeprefix(root) for name in moved})
    take_ranks(module, taken)
    restore_siblings(module, manifest.get("siblings", {}))
    frozen, scales = _frozen_names(module) - own_moved.keys(), _scale_names(module)
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
        raise CheckpointFileError(
            "this checkpoint holds a LoRA adapter only, but the module has lora=None: give it the same lora settings "
            "(as an argument if its __init__ takes them, else as the attribute of its class), "
            f"{checkpoint[CHECKPOINT_KEY]['config']}."
        )


def _manifest(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    manifest = checkpoint.get(CHECKPOINT_KEY)
    if manifest is None:
        raise CheckpointFileError(
            "this checkpoint holds no adapter (a full fine-tuning run, or one without lightning-lora), but the module "
            "has one. Load it with lora=None (as an argument if __init__ takes it, else in a subclass: class "
            "Full(YourModule): lora = None). To train adapters on its weights, load them before the adapters exist: "
            'module = YourModule(...); module.load_state_dict(torch.load(path, weights_only=True)["state_dict"]); '
            "trainer.fit(module)."
        )
    missing = sorted(_FIELDS - manifest.keys()) if isinstance(manifest, dict) else None
    if missing or not isinstance(manifest, dict):
        fault = f"it lacks {', '.join(missing)}" if missing else f"it is a {type(manifest).__name__}, not a mapping"
        raise CheckpointFileError(f"the checkpoint's {CHECKPOINT_KEY!r} entry is damaged: {fault}. Load another file.")
    if manifest["format"] > _FORMAT:
        raise CheckpointFileError(
            f"checkpoint format {manifest['format']} is newer than {_FORMAT}: update lightning-lora."
        )
    return manifest


def _check_adapters(
    module: LightningModule,
    manifest: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    taken: Mapping[str, tuple[int, float]],
) -> None:
    """Compare names, shapes and scales; the same factors at another scale would be another function."""
    weights = adapted_weights(module)
    changes = setting_changes(manifest["config"], next(iter(weights.values()))[0].lora_spec.config.to_dict())
    try:
        check_tensors(expected, {name: _shaped(shape) for name, shape in manifest["tensors"].items()})
    except AdapterFileError as error:
        raise CheckpointFileError(f"{error}{_advice(changes)}") from None
    trained_with = LoRAConfig.from_dict(manifest["config"])
    wrong = []
    for name, (layer, weight) in weights.items():
        spec, alpha = layer.lora_specs[weight], manifest.get("alphas", {}).get(name)
        if name in taken or alpha is None:  # growth keeps the scale
            continue
        if (scale := trained_with.scale(spec.rank, alpha)) != spec.scale:
            wrong.append(f"{name} has {scale:g} there and {spec.scale:g} here")
    if wrong:
        raise CheckpointFileError(
            f"the adapter does not fit this module: {len(wrong)} of {len(weights)} layers were trained with another "
            f"scale, alpha / rank: {first_five(wrong)}.{_advice(changes)}"
        )


def _advice(changes: str) -> str:
    return (
        f" It was trained with other settings ({changes}): give the module those of the checkpoint." if changes else ""
    )


def _check_base(base: BasePrints, manifest: Mapping[str, Any], moved: Collection[str]) -> None:
    # A base without values in memory has no fingerprint.
    trained_on = manifest["base_fingerprint"]
    if base is None or trained_on is None or (own := fingerprint(base)) == trained_on:
        return
    # Files of older versions have the fingerprint only.
    expected = {name: WeightPrint.from_dict(entry) for name, entry in manifest.get("base", {}).items()}
    # What the file holds itself need not be in the base.
    other = [name for name in other_weights(expected, base) if name not in moved] if expected else []
    if expected and not other:
        return
    named = f"{len(other)} of {len(base)} frozen parameters differ: {first_five(sorted(other))}. " if other else ""
    raise BaseMismatchError(
        f"this checkpoint was trained on a base with fingerprint {trained_on}, the module's base has {own}. {named}"
        "Load the right base, or set lora_allow_other_base = True on the module (--allow_other_base true on the "
        "command line). Random weights, as of a new head, differ in every process: name such a module in trainable, "
        "or seed it."
    )


def _shaped(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), device="meta")


def _trained_parameters(module: LightningModule) -> dict[str, Tensor]:
    """Trained parameters by their names in the state dict, and factors, which may be frozen on purpose."""
    factors = {id(factor) for factor in factor_parameters(module).values()}
    return {
        state_dict_name(name): parameter
        for name, parameter in module.named_parameters()
        if is_trained(module, parameter) or id(parameter) in factors
    }


def _moved_parameters(module: LightningModule) -> dict[str, Tensor]:
    """Frozen parameters that are not what they were, by their names in the state dict."""
    changed, trained = changed_tensors(module), _trained_parameters(module)
    names = ((name, state_dict_name(name), p) for name, p in module.named_parameters())
    return {key: p for name, key, p in names if plain_name(name) in changed and key not in trained}


def _frozen_names(module: LightningModule) -> set[str]:
    """State-dict names of everything that checkpoints leave out."""
    named = module.named_parameters(remove_duplicate=False)
    frozen = {state_dict_name(name) for name, p in named if not is_trained(module, p)}
    return frozen - _trained_parameters(module).keys() | _scale_names(module)


def _scale_names(module: LightningModule) -> set[str]:
    """State-dict names of entries that belong to quantised weights without being parameters."""
    return {f"{name}.{key}" for name, layer in quantised_layers(module).items() for key in scale_keys(layer)}
