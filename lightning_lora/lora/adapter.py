"""Operations on the adapters of any module: inject, merge, unmerge, remove, disable, and their state dict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterFolderError, check_arguments, first_five
from lightning_lora.lora.base_values import base_values, forget_base_values, keep_base_values
from lightning_lora.lora.changed_tensors import forget_tensors, record_tensors
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.frozen_copies import (
    frozen_copies,
    frozen_layers,
    hold_copies,
    notes_on_frozen,
    original_name,
)
from lightning_lora.lora.layers.adapted import factor_parameters, lora_layers
from lightning_lora.lora.layers.attention import attach_readers, detach_readers
from lightning_lora.lora.layers.base import attach, detach
from lightning_lora.lora.layers.quantised_weights import keep_stored_values
from lightning_lora.lora.layers.shared_factors import share_factors
from lightning_lora.lora.merged_saving import save_merged_models, save_plain_models
from lightning_lora.lora.merging import adapted, check_not_merged, merged
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.reports import InjectionReport, count_parameters
from lightning_lora.lora.shards import (
    check_not_flattened,
    check_not_sharded,
    full_parameters,
    full_tensor,
    reshard,
)
from lightning_lora.lora.targets import new_weights
from lightning_lora.lora.targets.called_together import group_compiled
from lightning_lora.lora.targets.resolve import Target, Targets, note_on_unknown, resolve_targets
from lightning_lora.lora.targets.shared_weights import TiedWeights, untie
from lightning_lora.lora.vocabulary import unwatch_vocabulary, watch_vocabulary


def inject_lora(module: nn.Module, config: LoRAConfig) -> InjectionReport:
    """Adapt ``module`` in place: the chosen layers get ``lora_A`` and ``lora_B``, everything else is frozen.

    Names, hooks, module identities and base state-dict keys stay as they were. On the meta device this takes no
    memory. If an error is raised, nothing has been changed.

    A module that was frozen before while another one of the same class and shapes was not, as a teacher or a target
    network is, keeps frozen adapters, which start as those of the other one and are saved. Otherwise adapters train
    even in frozen modules: with a frozen body they are all that trains. A new head of a transformers model, which its
    checkpoint did not hold, is trained in full like the modules named in ``trainable``. The report tells of all this,
    and of weights that no file seems to hold.

    Args:
        module: Any module, before it is wrapped or sharded and before its optimizer is built.
        config: What to adapt and how.

    Returns:
        The adapted layers, the layers left alone with reasons, and numbers of parameters.

    Raises:
        TargetNotFoundError: If a pattern matches nothing.
        ConfigError: If ``module`` is adapted already, or a target cannot be adapted.
        AlreadyShardedError: If the parameters are sharded already.
    """
    if isinstance(config, Mapping):
        config = LoRAConfig.from_dict(config)
    check_arguments(inject_lora, locals())
    check_not_sharded(module)
    targets = resolve_targets(module, config)
    notes = apply_targets(module, targets)
    return InjectionReport(
        layers={target.name: target.spec for target in targets.layers},
        trainable=tuple(targets.trainable),
        skipped=targets.skipped,
        parameters=count_parameters(module),
        adapter_bytes=sum(p.numel() * p.element_size() for p in factor_parameters(module).values()),
        notes=tuple(notes),
    )


def apply_targets(module: nn.Module, targets: Targets) -> list[str]:
    """Freeze ``module``, attach the resolved adapters, and unfreeze the modules trained in full.

    Returns:
        What a run should know at its start.
    """
    copies = frozen_copies(module)
    frozen = frozen_layers(module, [target.name for target in targets.layers])
    # A new head is random in the copy, too, until the copy follows.
    heads = [
        n for name, _ in module.named_modules() if original_name(n := plain_name(name), copies) in targets.trainable
    ]
    record_tensors(module, [plain_name(name) for name in (*copies, *targets.trainable)], always=heads)
    freeze(module)
    attach_targets(module, targets.layers, targets.tied)
    held = hold_copies(module, copies)
    # In a frozen copy only what is trained there alone: a pattern such as "head" also means the copy's.
    trainable = [
        part for name, part in targets.trainable.items() if original_name(name, copies) not in targets.trainable
    ]
    # Factors inside these modules start at zero anyway.
    keep_base_values(module, [tensor for part in trainable for tensor in (*part.parameters(), *part.buffers())])
    for trained in trainable:
        trained.requires_grad_(True)
    return [
        *([note_on_unknown(targets.unknown)] if targets.unknown else []),
        *new_weights.notes(targets.new),
        *notes_on_frozen(module, copies, held, frozen),
    ]


def freeze(module: nn.Module) -> None:
    """Freeze every parameter of ``module``, and keep quantised layers from changing their stored values."""
    module.requires_grad_(False)
    keep_stored_values(module)


def attach_targets(module: nn.Module, layers: Iterable[Target], tied: TiedWeights) -> None:
    """Adapt the resolved layers of ``module``, and untie or share their weights as resolved."""
    untie(module, tied.untied)
    adapted = {plain_name(target.name): attach(target.module, target.kind, target.specs) for target in layers}
    modules = {plain_name(name): child for name, child in module.named_modules()}
    for follower, source in tied.followers.items():
        share_factors(modules[follower], adapted[source])
    attach_readers(module)
    group_compiled(module)
    watch_vocabulary(module)
    save_merged_models(module, merged)


def remove_lora(module: nn.Module) -> None:
    """Remove the adapters; every layer gets its old class back. A merged module keeps the merged weights.

    Frozen parameters stay frozen. Call ``module.requires_grad_()`` to train the module further.

    Raises:
        ConfigError: If nothing is adapted.
        AlreadyShardedError: If the weights are sharded.
    """
    check_arguments(remove_lora, locals())
    check_not_sharded(module)
    # Before the layers are counted: a resized vocabulary may have replaced every adapted layer.
    was_watched = unwatch_vocabulary(module)
    layers = lora_layers(module) if was_watched else adapted(module)
    for layer in layers.values():
        detach(layer)
    detach_readers(module)
    forget_base_values(module)
    forget_tensors(module)
    save_plain_models(module)


@contextmanager
def disable_lora(module: nn.Module) -> Iterator[None]:
    """Within the context, ``module`` computes what its base computes. The previous state is restored on exit.

    Modules trained in full (``trainable``) and running statistics have the values that they had when the module was
    adapted; `load_adapter` and checkpoints leave these alone. What you unfroze yourself later keeps its trained values.

    Raises:
        ConfigError: If nothing is adapted, the updates are merged, or a module trained in full had no values yet when
            it was adapted.
        AlreadyShardedError: If a module trained in full is sharded.
    """
    layers = adapted(module)
    check_not_merged(module, "disable adapters")
    before = {layer: layer.lora_enabled for layer in layers.values()}
    try:
        for layer in before:
            layer.lora_enabled = False
        with base_values(module):
            yield
    finally:
        for layer, enabled in before.items():
            layer.lora_enabled = enabled


def lora_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Dotted name to adapter tensor, detached and with its full value. A collective if ``module`` is sharded.

    Raises:
        ConfigError: If nothing is adapted.
        AlreadyShardedError: If FSDP1 has flattened the factors and ``module`` is not its outermost wrapper.
    """
    check_arguments(lora_state_dict, locals())
    reshard(module)
    adapted(module)
    with full_parameters(module):
        check_not_flattened(module, "read the adapter")
        return {name: full_tensor(factor) for name, factor in factor_parameters(module).items()}


def load_lora_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors into an adapted module. If any name or shape differs, nothing is changed.

    Raises:
        AdapterFileError: If tensors are missing, unknown or of another shape (the message names the first five), not of
            floating point, or not finite.
        ConfigError: If nothing is adapted, or the updates are merged.
        AlreadyShardedError: If the weights are sharded.
    """
    adapted(module)
    check_not_sharded(module)
    check_not_merged(module, "load adapters")
    expected = factor_parameters(module)
    _check_values(state)
    check_tensors(expected, state)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(state[name])


def _check_values(state: Mapping[str, Any]) -> None:
    """Refuse what cannot be an adapter's tensor, whatever the module is."""
    check_arguments(_check_values, locals(), AdapterFolderError)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            problem = f"is {type(value).__name__}, not a tensor"
        elif not value.is_floating_point():
            problem = f"is of {value.dtype}, not of floating point"
        elif value.is_meta:
            problem = "is on the meta device and has no values"
        else:
            continue
        raise AdapterFolderError(f"nothing was loaded: {name} {problem}.")
    check_finite(state, "nothing was loaded")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `AdapterFileError` if a tensor is empty or holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise AdapterFolderError(f"{where}: {name} is empty, shape {tuple(tensor.shape)}.")
        if bad := int((~tensor.isfinite()).sum()):
            raise AdapterFolderError(f"{where}: {name} holds {bad} NaN or infinite values of {tensor.numel()}.")


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise `AdapterFileError` unless ``found`` holds the names and shapes of ``expected``."""
    missing = [f"missing {name}" for name in expected if name not in found]
    unknown = [f"unknown {name}" for name in found if name not in expected]
    # In turns, because only the first few are shown, and one name beside the other tells how they differ.
    problems = [problem for pair in zip_longest(missing, unknown) for problem in pair if problem is not None]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        raise AdapterFolderError(
            f"the adapter does not fit this module: {len(problems)} of {len(expected)} expected tensors disagree: "
            f"{first_five(problems)}."
        )
