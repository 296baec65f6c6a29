"""An architecture of the table, built and adapted once for its tests or its line in docs."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject_lora, load_lora_state_dict, lora_state_dict
from tests.architectures.entry import Architecture


class AdaptedModel:
    """One architecture with ``targets="all"`` and random factors, as after training.

    Code that changes a model takes a `copy`, because building again takes longer.
    """

    def __init__(self, entry: Architecture) -> None:
        self.entry = entry
        self._base = entry.build()
        self.module = self.base()
        settings = {"targets": "all", "exclude": list(entry.exclude), "trainable": entry.trainable}
        self.config = LoRAConfig.from_dict({"rank": 2, "alpha": 4.0, **settings})
        self.report = inject_lora(self.module, self.config)
        generator = torch.Generator().manual_seed(1)
        state = lora_state_dict(self.module)
        load_lora_state_dict(
            self.module, {name: 0.1 * torch.randn(factor.shape, generator=generator) for name, factor in state.items()}
        )
        self.expected = self.output(self.module)

    def base(self) -> nn.Module:
        """A copy of the model without adapters."""
        return copy.deepcopy(self._base)

    def copy(self) -> nn.Module:
        """A copy of the adapted model."""
        return copy.deepcopy(self.module)

    def output(self, module: nn.Module) -> Tensor:
        """The output of ``module`` in eval mode and without gradients, where torch takes its fast paths."""
        with torch.no_grad():
            return self.entry.output(module, **self.entry.inputs())

    def output_in(self, module: nn.Module, dtype: Any) -> Tensor:
        """The output for inputs of this type, or for the usual ones under autocast to bfloat16."""
        inputs = self.entry.inputs()
        if dtype != "autocast":
            inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
            return self.entry.output(module, **inputs)

    def reason_to_leave_out(self, name: str) -> str | None:
        """Why the table leaves a parameter out; None for a parameter that must be adapted."""
        return next((reason for pattern, reason in self.entry.left_out.items() if fnmatchcase(name, pattern)), None)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest output."""
    return float((one - other).abs().max() / one.abs().max())
