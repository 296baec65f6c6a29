"""Updates added to the base weights, and taken out again bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from lightning_lora.errors import AdapterStateError, check_arguments, first_five
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.quantised_linear import LoRAQuantisedLinear
from lightning_lora.lora.reports import MergeReport
from lightning_lora.lora.shards import check_not_sharded
from lightning_lora.lora.vocabulary import check_vocabulary


def merge_lora(module: nn.Module) -> MergeReport:
    """Add every update to its base weight, computed in float32 and rounded once. `unmerge_lora` restores the weights.

    A quantised layer then holds a plain weight of the type it had before it was quantised, and a warning says so.
    Another warning says where rounding took more than a tenth of an update.

    Returns:
        The share of each update that rounding took.

    Raises:
        ConfigError: If nothing is adapted, the updates are merged already, or a weight is on the meta device.
        AlreadyShardedError: If the weights are sharded.
    """
    report = merge_layers(module)
    plain = [layer.weight for layer in lora_layers(module).values() if isinstance(layer, LoRAQuantisedLinear)]
    if plain:
        types = ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in plain}))
        size = sum(weight.numel() * weight.element_size() for weight in plain)
        warnings.warn(
            f"{len(plain)} merged layers are no longer quantised: their weights are {types} and take {size / 1e6:,.1f} "
            f"MB. unmerge_lora(module) restores the quantised weights.",
            stacklevel=2,
        )
    return report


def merge_layers(module: nn.Module) -> MergeReport:
    """Merge as `merge_lora` does, without the warning about quantised layers."""
    layers = adapted(module)
    check_not_sharded(module)
    check_not_merged(module, "merge twice")
    _check_values(layers)
    report = MergeReport({name: layer.merge() for name, layer in layers.items()})
    report.warn_if_lossy()
    return report


def _check_values(layers: Mapping[str, LoRALayer]) -> None:
    empty = [name for name, layer in layers.items() if any(p.is_meta for p in layer.parameters(recurse=False))]
    if empty:
        raise AdapterStateError(
            f"cannot merge: {len(empty)} layers are on the meta device and have no values ({first_five(empty)}). Load "
            "their weights first."
        )


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Within the context the updates are merged; the previous state is restored on exit, bit for bit."""
    if any(layer.lora_merged for layer in lora_layers(module).values()):
        yield
        return
    merge_layers(module)
    try:
        yield
    finally:
        unmerge_lora(module)


def unmerge_lora(module: nn.Module) -> None:
    """Restore the base weights as they were before `merge_lora`, bit for bit.

    Raises:
        ConfigError: If nothing is adapted, or nothing is merged.
    """
    merged = [layer for layer in adapted(module).values() if layer.lora_merged]
    if not merged:
        raise AdapterStateError("there is nothing to unmerge: merge_lora(module) was not called.")
    for layer in merged:
        layer.unmerge()


def check_not_merged(module: nn.Module, action: str) -> None:
    """Raise `ConfigError` if any update is merged, or fits no more: the adapter would count twice or not at all."""
    check_vocabulary(module)
    merged = [name for name, layer in lora_layers(module).items() if layer.lora_merged]
    if merged:
        raise AdapterStateError(
            f"cannot {action}: {len(merged)} layers are merged ({first_five(merged)}). Call unmerge_lora(module) first."
        )


def adapted(module: nn.Module) -> dict[str, LoRALayer]:
    """Name to adapted layer; raise `ConfigError` if there is none, or if its vocabulary was resized since."""
    check_arguments(adapted, locals())
    check_vocabulary(module)
    layers = lora_layers(module)
    if not layers:
        raise AdapterStateError(f"{type(module).__name__} has no adapters: call inject_lora(module, config) first.")
    return layers
