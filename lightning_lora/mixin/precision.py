"""Lightning's plugin for quantised layers, applied before the adapters are injected instead of after."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import BitsandbytesPrecision

from lightning_lora.errors import ConfigError, first_five
from lightning_lora.lightning_private import attached_trainer
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.layers.quantised_weights import is_bitsandbytes


def quantise_first(module: LightningModule) -> None:
    """Convert and quantise ``module`` now if the trainer has a `BitsandbytesPrecision`.

    By default the plugin does so after ``configure_model``, and replaces adapted layers by new ones.

    Raises:
        ConfigError: If layers are already adapted that the plugin would replace.
    """
    plugin = bitsandbytes_plugin(module)
    if plugin is None:
        return
    doomed = [name for name, layer in lora_layers(module).items() if isinstance(layer, torch.nn.modules.linear.Linear)]
    if doomed and not any(is_bitsandbytes(layer) for layer in module.modules()):
        raise ConfigError(
            f"BitsandbytesPrecision would replace {len(doomed)} adapted layers by layers without adapters "
            f"({first_five(doomed)}). Let LoRAMixin or the LoRA callback inject the adapters: they quantise first."
        )
    # Around `configure_model` the plugin replaces torch.nn.Linear by its own class, and would find nothing to convert.
    stand_in, torch.nn.Linear = torch.nn.Linear, torch.nn.modules.linear.Linear
    try:
        plugin.convert_module(module)
    finally:
        torch.nn.Linear = stand_in
    for layer in module.modules():
        # bitsandbytes quantises a layer when it is moved to its device.
        if is_bitsandbytes(layer):
            layer.to(module.trainer.strategy.root_device)


def bitsandbytes_plugin(module: LightningModule) -> BitsandbytesPrecision | None:
    """The trainer's `BitsandbytesPrecision`; None without one, or without a trainer."""
    plugin = getattr(attached_trainer(module), "precision_plugin", None)
    return plugin if isinstance(plugin, BitsandbytesPrecision) else None
