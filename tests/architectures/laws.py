"""What the tests and the table in docs measure on an adapted model."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lightning_lora import (
    InjectionReport,
    LoRAConfig,
    inject_lora,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    unmerge_lora,
)
from tests.architectures.entry import Architecture


def adapted(entry: Architecture) -> tuple[nn.Module, InjectionReport]:
    """The model with ``targets="all"``, its factors random as after training."""
    module = entry.build()
    settings = {"targets": "all", "exclude": list(entry.exclude), "trainable": entry.trainable}
    report = inject_lora(module, LoRAConfig.from_dict({"rank": 2, "alpha": 4.0, **settings}))
    generator = torch.Generator().manual_seed(1)
    state = {
        name: 0.1 * torch.randn(factor.shape, generator=generator) for name, factor in lora_state_dict(module).items()
    }
    load_lora_state_dict(module, state)
    return module, report


def output(entry: Architecture, module: nn.Module) -> Tensor:
    """In eval and without gradients, where torch takes its fast paths."""
    with torch.no_grad():
        return entry.output(module, **entry.inputs())


def difference(one: Tensor, other: Tensor) -> float:
    """The largest, relative to the size of the output."""
    return float((one - other).abs().max() / one.abs().max())


def base_weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything that has two axes or more and is no factor, by an own walk."""
    return {
        name: parameter.detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.ndim >= 2 and "lora_" not in name.rpartition(".")[2]
    }


def changed_by_merging(module: nn.Module) -> set[str]:
    """The weights an adapter really reaches: told by their values, not by what any report says."""
    before = base_weights(module)
    merge_lora(module)
    after = base_weights(module)
    unmerge_lora(module)
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def reason_to_leave_out(entry: Architecture, name: str) -> str | None:
    """What the table says of a parameter; None where it must be adapted."""
    return next((reason for pattern, reason in entry.left_out.items() if fnmatchcase(name, pattern)), None)
