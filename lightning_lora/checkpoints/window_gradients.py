"""Gradients of an open accumulation window: saved with the run, and restored into the parameters.

The window is not repeated from its start, because buffers, metrics and callbacks would see its batches a second time.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_lora.checkpoints.loop_position import current_position
from lightning_lora.lightning_private import is_accumulating
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.shards import local_shard


def is_window_open(trainer: Trainer) -> bool:
    """Whether gradients are accumulated that no optimizer step has used yet."""
    return is_accumulating(trainer) or not current_position(trainer).is_between_batches


def window_gradients(module: LightningModule) -> dict[str, Tensor]:
    """Copy the gradients of an open window to the CPU, this rank's shard of each; empty without an open window."""
    # A module that steps by itself may add to its gradients at any time.
    if module.automatic_optimization and not is_window_open(module.trainer):
        return {}
    gradients = {plain_name(name): p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: local_shard(g).detach().to("cpu", copy=True) for name, g in gradients.items()}


def restore_window_gradients(module: LightningModule, gradients: Mapping[str, Tensor]) -> None:
    """Set the gradients that `window_gradients` returned on this rank."""
    # Checkpoints of earlier versions hold the names as a compiled module has them.
    gradients = {plain_name(name): gradient for name, gradient in gradients.items()}
    for name, parameter in module.named_parameters():
        if (name := plain_name(name)) not in gradients:
            continue
        gradient = gradients[name].to(parameter.device, copy=True)
        if isinstance(parameter, DTensor):
            shape, stride = parameter.shape, parameter.stride()
            mesh, places = parameter.device_mesh, parameter.placements
            parameter.grad = DTensor.from_local(gradient, mesh, places, shape=shape, stride=stride)
        else:
            parameter.grad = gradient
