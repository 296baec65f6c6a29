"""Computing inside the call of a model's output layer, so that its scores over the vocabulary are never made.

Whatever surrounds the layer keeps working: the model runs as always, sharding strategies have gathered its weights,
and what the layer is given is what the model gives it. Only models that hand its output out as it is qualify; others
cap it (Gemma), scale it (Cohere, Granite), or add to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lora.lora.layers.linear import LoRALinear

# Attributes in which a module keeps the hooks that see its input, its output or their gradients.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The output layer of a transformers model if it is a linear layer, adapted or not, that nobody watches or patches.

    None for quantised and compiled layers, hooks, an own ``forward``, an adapter with dropout, and wherever
    ``torch.compile`` sees the whole model.
    """
    compiled = getattr(model, "_compiled_call_impl", None) is not None or "_orig_mod" in model._modules
    if torch.compiler.is_compiling() or compiled:
        return None
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear) or type(head).forward not in (nn.Linear.forward, LoRALinear.forward):
        return None
    if "forward" in head.__dict__ or head._compiled_call_impl is not None or any(getattr(head, at) for at in _HOOKS):
        return None
    if isinstance(head, LoRALinear) and head.lora_dropout:
        return None
    # FSDP2 gathers its shards before the layer is called.
    return head if isinstance(head.weight, DTensor) or _is_dense(head.weight) else None


def hands_out(head: nn.Linear, logits: Callable[[], Tensor]) -> bool:
    """Whether ``logits()`` calls ``head`` once and returns its output as it is: asked of the tensors, not of a config.

    Args:
        head: The output layer.
        logits: Runs the model on a few tokens; random numbers it draws are put back, gradients are off.
    """
    outputs: list[Any] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output)

    device = head.weight.device
    handle = head.register_forward_hook(keep)
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            returned = logits()
    finally:
        handle.remove()
    return len(outputs) == 1 and outputs[0] is returned


def at_head(head: nn.Linear, logits: Callable[[], Tensor], compute: Callable[..., Tensor]) -> Tensor | None:
    """Run a model with ``compute`` in the place of its output layer.

    Args:
        head: The output layer, a `plain_head`.
        logits: Runs the model and returns its logits, which are then what ``compute`` has returned.
        compute: Called with ``hidden``, ``weight``, ``bias`` and ``update`` of `head_loss`. Its result must have the
            three axes of logits, whatever their sizes, for code that slices them.

    Returns:
        What ``compute`` returned; None if the model did something to it, which makes it worthless, or if the weight
        is in shards even when the layer is called (tensor parallelism).
    """
    computed: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        if not _is_dense(head.weight):
            return type(head).forward(head, hidden)
        computed.append(compute(hidden=hidden, weight=head.weight, bias=head.bias, update=_update(head, hidden)))
        return computed[-1]

    head.__dict__["forward"] = forward
    try:
        returned = logits()
    finally:
        del head.__dict__["forward"]
    return returned if len(computed) == 1 and computed[0] is returned else None


def _is_dense(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def _update(head: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    if not isinstance(head, LoRALinear) or not head.lora_active:
        return None
    A, B = head.linear_factors()
    # Cast as in `linear_update`: the factors to the type of the activations.
    return F.linear(hidden, A.to(hidden.dtype)) * head.lora_spec.scale, B.to(hidden.dtype)
