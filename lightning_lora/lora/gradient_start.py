"""Starts adapters along the gradient of the frozen weights on a few batches (``init="gradient"``, LoRA-GA).

``A`` starts in the leading right singular vectors of the gradient, ``B`` in the next left ones. Until then, factors
are those of the default start. No gradient of a weight is formed where it is large: a layer's input and the gradient of
its output go into two thin sketches of it.

References:
    Wang et al., *LoRA-GA: Low-Rank Adaptation with Gradient Approximation*, NeurIPS 2024,
    https://arxiv.org/abs/2407.05000
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import GradientError, RankChangeError, first_five
from lightning_lora.lora.frozen_copies import equal_copies
from lightning_lora.lora.functional.sketched_svd import SketchedSVD
from lightning_lora.lora.functional.torch_internals import has_values
from lightning_lora.lora.layers.adapted import learning_layers
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.first_values import set_gradient_factors
from lightning_lora.lora.layers.linear import LoRAConv1D, LoRALinear
from lightning_lora.lora.merging import check_not_merged
from lightning_lora.lora.shards import check_not_sharded, full_tensor, is_dtensor, local_shard


def gradient_init(module: nn.Module, loss: Callable[[Any], Tensor], batches: Iterable[Any]) -> None:
    """Start the adapters of ``module``, made with ``init="gradient"``, along the gradient of its frozen weights.

    In ``Trainer.fit`` this happens by itself. The module computes what it computed before, up to rounding. Random
    numbers, gradients and buffers are the caller's: dropout draws, and batch norm moves, as in any forward pass.

    Example::

        inject_lora(model, LoRAConfig(rank=16, init="gradient"))
        gradient_init(model, lambda batch: model(**batch).loss, batches)

    Args:
        module: The adapted module, with fresh adapters.
        loss: Loss of a batch, a scalar that depends on what the adapted layers compute.
        batches: Batches on the device of the module; a few are enough, and all are used.

    Raises:
        ConfigError: If no adapter is waiting for such a start, there is no batch, or no layer receives a gradient.
        GradientError: If a gradient is NaN or infinite.
        AlreadyShardedError: If the weights are sharded.
    """
    check_not_sharded(module)
    check_not_merged(module, "start adapters")
    layers = waiting_layers(module)
    if not layers:
        raise RankChangeError("no adapter waits for a start along the gradient: adapt the module with init='gradient'.")
    if has_started(layers):
        raise RankChangeError("the adapters have started already: gradient_init is for fresh ones.")
    count = 0
    with watched_gradients(module, layers) as sketches:
        for batch in batches:
            loss(batch).backward()
            count += 1
    if not count:
        raise RankChangeError("there is no batch to start the adapters with: batches is empty.")
    start_along(module, layers, sketches)


def waiting_layers(module: nn.Module) -> dict[str, LoRALayer]:
    """Name to each adapted layer with factors of its own that starts along its gradient."""
    return {
        name: layer
        for name, layer in learning_layers(module).items()
        if isinstance(layer, (LoRALinear, LoRAConv1D))
        and not layer.lora_follows
        and layer.lora_spec.start
        and layer.lora_spec.config.init == "gradient"
    }


@torch.no_grad()
def has_started(layers: Mapping[str, LoRALayer]) -> bool:
    """Whether any ``B``, or this rank's shard of one, is no longer zero: the adapters have started or trained."""
    return any(bool(local_shard(layer.lora_B.detach()).any()) for layer in layers.values())


@contextmanager
def watched_gradients(module: nn.Module, layers: Mapping[str, LoRALayer]) -> Iterator[dict[str, SketchedSVD]]:
    """Within the context, backward passes add the gradient of each layer's weight to its sketch.

    Gradients of parameters are put aside, and back on exit. Layers that use the factors of one of ``layers`` add to
    its sketch.
    """
    if not all(map(has_values, module.parameters())):
        raise RankChangeError("adapters cannot start along a gradient: some parameters have no values yet.")
    sketches = {name: _sketch(layer, seed) for seed, (name, layer) in enumerate(layers.items())}
    names = {id(layer.lora_A): name for name, layer in layers.items()}
    before = [(parameter, parameter.grad) for parameter in module.parameters()]
    users = [(each, name) for each in module.modules() if (name := _name_of_factors(each, names)) is not None]
    handles = [
        layer.register_forward_hook(partial(_after_forward, name, sketches[name]), prepend=True, with_kwargs=True)
        for layer, name in users
    ]
    try:
        for parameter, _ in before:
            parameter.grad = None
        with torch.enable_grad():
            yield sketches
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in before:
            parameter.grad = gradient


def start_along(module: nn.Module, layers: Mapping[str, LoRALayer], sketches: Mapping[str, SketchedSVD]) -> list[str]:
    """Set the first values of the factors from the singular vectors of the sketched gradients.

    Frozen copies of the layers in ``module``, such as those of a teacher, that have their factors keep to them.

    Returns:
        Names of the layers without a gradient, which keep the default start.

    Raises:
        ConfigError: If no layer has a gradient.
        GradientError: If a gradient is NaN or infinite. Nothing has been changed.
    """
    wrong = [name for name, sketch in sketches.items() if not sketch.is_finite()]
    if wrong:
        raise GradientError(
            f"adapters cannot start along their gradient: it is NaN or infinite in {len(wrong)} of {len(sketches)} "
            f"layers ({first_five(wrong)}). Look for the fault in the first batches or the loss."
        )
    without = [name for name, sketch in sketches.items() if not sketch.range.any()]
    if len(without) == len(sketches):
        raise RankChangeError(
            f"adapters cannot start along their gradient: none of {len(sketches)} layers received one "
            f"({first_five(without)}). A compiled module hides it: compile after the start, or use another init."
        )
    copies = equal_copies(module, layers)
    for name in sketches.keys() - set(without):
        _start(layers[name], sketches[name])
    for copy, original in copies:
        _follow(copy, original)
    return without


def _sketch(layer: LoRALayer, seed: int) -> SketchedSVD:
    A, B = layer.lora_pair()
    # Factors may be shards; their shape is that of the whole.
    dtype = torch.promote_types(A.dtype, torch.float32)
    return SketchedSVD(B.shape[-2], A.shape[-1], 2 * layer.lora_spec.start, seed, A.device, dtype)


def _name_of_factors(layer: nn.Module, names: Mapping[int, str]) -> str | None:
    is_linear = isinstance(layer, (LoRALinear, LoRAConv1D))
    return names.get(id(layer.lora_A)) if is_linear else None


def _after_forward(name: str, sketch: SketchedSVD, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
    if not output.requires_grad:
        return
    x = args[0] if args else next(iter(kwargs.values()))
    output.register_hook(partial(_on_gradient, name, sketch, [x], x._version))


def _on_gradient(name: str, sketch: SketchedSVD, x: list[Tensor], version: int, d_y: Tensor) -> None:
    # A list, so that the input is freed as soon as it is used.
    if x[0]._version != version:
        raise RankChangeError(
            f"the input of {name} was changed in place, so its gradient is unknown: use another init."
        )
    sketch.add(x.pop(), d_y)


@torch.no_grad()
def _start(layer: LoRALayer, sketch: SketchedSVD) -> None:
    pair = layer.lora_pair()
    A, B = (full_tensor(factor).clone() for factor in pair)
    U, _, Vh = sketch.vectors()
    set_gradient_factors(A, B, U, Vh, layer.lora_spec.start)
    for factor, value in zip(pair, (A, B), strict=True):
        _write(factor, value)


@torch.no_grad()
def _follow(copy: LoRALayer, original: LoRALayer) -> None:
    for factor, source in zip(copy.lora_pair(), original.lora_pair(), strict=True):
        _write(factor, full_tensor(source))


def _write(factor: nn.Parameter, value: Tensor) -> None:
    """Copy a value into a factor; where there are several devices, that of the first one."""
    if is_dtensor(factor):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, factor.device_mesh, factor.placements)
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(value, src=0)
    factor.copy_(value)
