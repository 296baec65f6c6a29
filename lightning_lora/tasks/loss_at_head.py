"""Computing the loss in place of a model's output layer, so that the logits are never held.

The model runs as always and its output layer is called with the same input, after sharding strategies have gathered
the weights; only the computation inside the layer is replaced. This is correct only for models that return the output
of that layer unchanged. Others cap it (Gemma 2), scale it (Cohere, Granite), or add to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.lora.evaluation_mode import uncompiled
from lightning_lora.lora.functional.torch_internals import PLAIN_TYPES
from lightning_lora.lora.layers.linear import LoRALinear

# Attributes of a module that hold the hooks on its input, its output and their gradients.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The output layer of a transformers model if it is a linear layer, adapted or not, without hooks or patches.

    None if the layer is quantised or compiled, has hooks, a ``forward`` of its own or an adapter with dropout, and if
    ``torch.compile`` compiles the whole model.
    """
    if is_compiled(model):
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


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` compiles the whole model, or is doing so."""
    compiled = getattr(model, "_compiled_call_impl", None) is not None or "_orig_mod" in model._modules
    return torch.compiler.is_compiling() or compiled


def head_is_last(head: nn.Linear, logits: Callable[[], Tensor]) -> bool:
    """Whether ``logits()`` calls ``head`` once and returns the very tensor that it has returned.

    Args:
        head: The output layer.
        logits: Runs the model on a few tokens. It is called without gradients; random generators are restored.
    """
    outputs: list[Any] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output)

    handle = head.register_forward_hook(keep)
    try:
        with uncompiled(), torch.no_grad(), kept_random_state(head.weight.device):
            returned = logits()
    finally:
        handle.remove()
    return len(outputs) == 1 and outputs[0] is returned


def compute_at_head(head: nn.Linear, logits: Callable[[], Tensor], compute: Callable[..., Tensor]) -> Tensor | None:
    """Run a model with ``compute`` in place of its output layer.

    Args:
        head: The output layer, from `plain_head`.
        logits: Runs the model and returns its output, here the result of ``compute``.
        compute: Called with ``hidden``, ``weight``, ``bias`` and ``update`` of `head_loss`. Its result must have three
            axes of any size, as logits have, for models that slice them.

    Returns:
        The result of ``compute``. None if the model has changed it, which makes it meaningless, or if the weight is
        sharded even inside the layer (tensor parallelism).
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
    return type(weight) in PLAIN_TYPES and weight.is_floating_point()


def _update(head: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    if not isinstance(head, LoRALinear) or not head.lora_active:
        return None
    A, B = head.linear_factors()
    # The factors are cast to the type of the activations, as in `linear_update`.
    return F.linear(hidden, A.to(hidden.dtype)) * head.lora_spec.scale, B.to(hidden.dtype)
