"""What is frozen when the adapters have been made stays frozen: its training would be in no checkpoint's plan."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import nn

from lightning_lora.errors import GuardError, first_five
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.patterns import plain_name


class KeptFrozen:
    """Remembers the frozen parameters of an adapted module, and refuses to train one of them.

    A module may still be opened by hand between `apply_lora` and the end of ``configure_model``; `apply_lora` of the
    next process does the same then, so that its checkpoints can be read.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._parameters: dict[str, nn.Parameter] = {}

    def remember(self, module: LightningModule) -> None:
        """Take what is frozen now as what has to stay so; nothing in a module without adapters."""
        self._parameters = {}
        self._names = {name for name, parameter in _named(module) if not parameter.requires_grad}
        if not lora_layers(module):
            self._names = set()

    def training_starts(self, module: LightningModule) -> None:
        """Check by name, since strategies replace parameters, and find the parameters that `check` looks at."""
        self._parameters = {name: parameter for name, parameter in _named(module) if name in self._names}
        self.check()

    def check(self) -> None:
        """Raise `GuardError` if one of the parameters requires a gradient."""
        opened = [name for name, parameter in self._parameters.items() if parameter.requires_grad]
        if opened:
            raise GuardError(
                f"{len(opened)} frozen base weights were unfrozen after the adapters were made: {first_five(opened)}. "
                f"They would train in full, and the checkpoints could not be loaded. Name modules to train in full in "
                f"LoRAConfig(trainable=[...]), or leave out what sets requires_grad."
            )


def _named(module: LightningModule) -> list[tuple[str, nn.Parameter]]:
    return [(plain_name(name), parameter) for name, parameter in module.named_parameters()]
