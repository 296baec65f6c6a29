"""Raises the rank of adapters without changing what the module computes, or gives them the ranks of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_lora.errors import RankChangeError, TargetNotFoundError, did_you_mean
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import adapted_weights
from lightning_lora.lora.layers.base import AdapterSpec, LoRALayer
from lightning_lora.lora.merging import check_not_merged
from lightning_lora.lora.shards import check_not_sharded


@torch.no_grad()
def grow_adapters(module: nn.Module, ranks: Mapping[str, int]) -> None:
    """Raise the rank of adapted weights in place; the module computes the same before and after.

    Of one factor the new part is random, as in a new adapter, by default values where the adapter started orthogonal
    or principal (PiSSA); of the other (`LoRALayer.zero_factor`) it is zero. The scale stays, so alpha becomes
    ``alpha * new rank / old rank`` (``alpha * sqrt(...)`` with rsLoRA). The parameter objects stay, with new data of
    another shape and no gradient: the state that an optimizer has for them must be extended by the caller. If an error
    is raised, nothing has been changed.

    Args:
        ranks: Name of an adapted weight, as in `adapted_weights`, to its new rank, at least the present one.

    Raises:
        TargetNotFoundError: If a name is not that of an adapted weight.
        ConfigError: If a rank is below the present one or above the full rank of the weight, or updates are merged.
        AlreadyShardedError: If the factors are sharded.
    """
    check_not_sharded(module)
    check_not_merged(module, "raise the rank of adapters")
    weights = adapted_weights(module)
    for name, rank in ranks.items():
        if name not in weights:
            raise TargetNotFoundError(f"{name!r} is no adapted weight{did_you_mean(name, weights)}")
        _check_rank(name, *weights[name], rank)
    for name, rank in ranks.items():
        layer, weight = weights[name]
        if rank != layer.lora_specs[weight].rank:
            _grow(layer, weight, rank)
    _update_followers(module)


@torch.no_grad()
def take_ranks(module: nn.Module, specs: Mapping[str, tuple[int, float]]) -> None:
    """Give adapted weights other ranks and alphas, before the factors of a file with these are loaded.

    A factor of another rank gets zeros for values and no gradient; the parameter objects stay.

    Args:
        specs: Name of an adapted weight to its new rank and alpha.

    Raises:
        AlreadyShardedError: If a rank would change and the factors are sharded.
    """
    weights = adapted_weights(module)
    if any(rank != weights[name][0].lora_specs[weights[name][1]].rank for name, (rank, _) in specs.items()):
        check_not_sharded(module)
    for name, (rank, alpha) in specs.items():
        layer, weight = weights[name]
        spec = replace(layer.lora_specs[weight], rank=rank, alpha=alpha)
        layer.lora_specs = layer.lora_specs | {weight: spec}
        for factor, shape in zip(layer.lora_pair(weight), layer.factor_shapes(layer, weight, spec), strict=False):
            if factor.shape != shape:
                factor.data, factor.grad = factor.new_zeros(shape), None
    _update_followers(module)


def grown_spec(spec: AdapterSpec, rank: int) -> AdapterSpec:
    """``spec`` at another rank with the same scale."""
    ratio = rank / spec.rank
    factor = ratio if spec.config.scaling == "standard" else math.sqrt(ratio)
    return replace(spec, rank=rank, alpha=spec.alpha * factor)


def _check_rank(name: str, layer: LoRALayer, weight: str, rank: int) -> None:
    spec, shape = layer.lora_specs[weight], layer.weights(layer)[weight]
    highest = max(spec.rank, min(shape.num_in, shape.num_out))
    if not isinstance(rank, int) or isinstance(rank, bool) or not spec.rank <= rank <= highest:
        raise RankChangeError(
            f"the rank of {name!r}, a ({shape.num_out}, {shape.num_in}) weight, can be raised from {spec.rank} to "
            f"{highest} at most, got {rank!r}."
        )


def _grow(layer: LoRALayer, weight: str, rank: int) -> None:
    specs = layer.lora_specs | {weight: grown_spec(layer.lora_specs[weight], rank)}
    layer.lora_specs = {name: _drawn_by_parts(spec) for name, spec in specs.items()}
    pair = layer.lora_pair(weight)
    # Factors of other weights of the layer are drawn anew too, in their own memory.
    before = {name: factor.detach().clone() for name, factor in layer.lora_factors().items()}
    shapes = layer.factor_shapes(layer, weight, layer.lora_specs[weight])
    for factor, shape in zip(pair, shapes, strict=False):  # a magnitude has no rank
        factor.data = factor.new_empty(shape)
        factor.grad = None
    layer.reset_factors()
    layer.lora_specs = specs
    for name, factor in layer.lora_factors().items():
        leading(factor.data, before[name]).copy_(before[name])


def _drawn_by_parts(spec: AdapterSpec) -> AdapterSpec:
    """``spec`` with first values of which one factor is zero; others, as orthogonal ones, belong to a whole pair."""
    init = spec.config.init if spec.config.init in ("default", "gaussian") else "default"
    return replace(spec, start=0, config=replace(spec.config, init=init, init_batches=LoRAConfig.init_batches))


def leading(wide: Tensor, narrow: Tensor) -> Tensor:
    """The part of ``wide`` that the values of ``narrow`` have; the rank is the axis in which they differ."""
    return wide[tuple(slice(0, length) for length in narrow.shape)]


def _update_followers(module: nn.Module) -> None:
    """Layers that share factors with another layer take its rank too."""
    owners = {id(layer.lora_pair(weight)[0]): layer for layer, weight in adapted_weights(module).values()}
    for layer in module.modules():
        if isinstance(layer, LoRALayer) and layer.lora_follows:
            layer.lora_specs = dict(owners[id(layer.lora_pair()[0])].lora_specs)
