"""Lightning's plugin for quantised layers, at work before the adapters instead of after them."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import BitsandbytesPrecision

from lightning_lora.errors import ConfigError, first_five
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.layers.quantised_weights import is_bitsandbytes


def quantise_first(module: LightningModule) -> None:
    """If the trainer has a `BitsandbytesPrecision`, let it convert and quantise ``module`` now.

    Left to itself it does so after ``configure_model``, and puts new layers in the place of adapted ones.

    Raises:
        ConfigError: If layers are adapted that the plugin is yet to replace.
    """
    plugin = bitsandbytes_plugin(module)
    if plugin is None:
        return
    doomed = [name for name, layer in lora_layers(module).items() if isinstance(layer, torch.nn.modules.linear.Linear)]
    if doomed and not any(is_bitsandbytes(layer) for layer in module.modules()):
        raise ConfigError(
            f"BitsandbytesPrecision would replace {len(doomed)} adapted layers by layers without adapters "
            f"({first_five(doomed)}). Leave the adapting to LoRAMixin or the LoRA callback: they let it quantise first."
        )
    # Around `configure_model` the plugin's own class stands for torch.nn.Linear, and it would find nothing to convert.
    stand_in, torch.nn.Linear = torch.nn.Linear, torch.nn.modules.linear.Linear
    try:
        plugin.convert_module(module)
    finally:
        torch.nn.Linear = stand_in
    for layer in module.modules():
        # Moving a layer of bitsandbytes to its device is what quantises it.
        if is_bitsandbytes(layer):
            layer.to(module.trainer.strategy.root_device)


def bitsandbytes_plugin(module: LightningModule) -> BitsandbytesPrecision | None:
    """The trainer's `BitsandbytesPrecision`; None without one, or without a trainer."""
    plugin = getattr(module._trainer, "precision_plugin", None)
    return plugin if isinstance(plugin, BitsandbytesPrecision) else None
