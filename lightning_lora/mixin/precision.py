"""Lightning's plugins that replace layers: one is applied before the adapters are injected, the other is refused."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision

from lightning_lora.errors import OptimizerSettingError, first_five
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
        raise OptimizerSettingError(
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


def refuse_replaced_layers(module: LightningModule) -> None:
    """Raise `ConfigError` if the trainer's `TransformerEnginePrecision` would replace the adapted layers by others."""
    plugin = getattr(attached_trainer(module), "precision_plugin", None)
    if isinstance(plugin, TransformerEnginePrecision) and plugin.replace_layers is not False:
        raise OptimizerSettingError(
            "TransformerEnginePrecision replaces every nn.Linear after configure_model, adapters included, by layers "
            "that train in full: give it replace_layers=False, or use precision='bf16-true'."
        )


def bitsandbytes_plugin(module: LightningModule) -> BitsandbytesPrecision | None:
    """The trainer's `BitsandbytesPrecision`; None without one, or without a trainer."""
    plugin = getattr(attached_trainer(module), "precision_plugin", None)
    return plugin if isinstance(plugin, BitsandbytesPrecision) else None
