"""Ranks that have grown in the run of a checkpoint, and which the module that loads it takes over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_lora.errors import AlreadyShardedError, CheckpointFileError
from lightning_lora.lora.layers.adapted import adapted_weights
from lightning_lora.lora.shards import check_not_sharded

# Settings that may differ, because no rank or scale follows from them: they select layers, whose names are compared, or
# say how factors are trained. Every other setting, and one that is new, is compared.
_FREE = {
    *("targets", "exclude", "trainable", "adapt_head", "adapt_embeddings", "tied_weights"),
    *("dropout", "lr_multiplier", "lr_multiplier_pattern", "lora_plus_ratio", "adapter_dtype", "init_batches"),
}


def ranks_to_take(module: nn.Module, manifest: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """Name of each adapted weight that has another rank in the checkpoint, to its rank and alpha there.

    Empty unless the checkpoint's run began with the settings of ``module``, so that only growth explains the
    difference: `RankGrowth` in that run, or in one that ``module`` has made.

    Raises:
        AdapterFileError: If ranks have to change and the module is sharded.
    """
    weights, ranks = adapted_weights(module), manifest.get("ranks", {})
    specs = {name: layer.lora_specs[weight] for name, (layer, weight) in weights.items()}
    own, theirs = next(iter(specs.values())).config.to_dict(), manifest["config"]
    if ranks.keys() != specs.keys() or any(own[name] != theirs.get(name, own[name]) for name in own.keys() - _FREE):
        return {}
    taken = {name: (rank, manifest["alphas"][name]) for name, rank in ranks.items() if rank != specs[name].rank}
    if taken:
        try:
            check_not_sharded(module)
        except AlreadyShardedError as error:
            name, (rank, alpha) = next(iter(taken.items()))
            raise CheckpointFileError(
                f"{len(taken)} of {len(specs)} layers have another rank in the checkpoint, because ranks grew in its "
                f"run, and a sharded module cannot take it over. Load it on one device or with DDP, or give every "
                f"grown layer its rank and alpha, such as rank_pattern={{{name!r}: {rank}}}, alpha_pattern={{{name!r}: "
                f"{alpha:g}}}."
            ) from error
    return taken


def taken_shapes(module: nn.Module, taken: Mapping[str, tuple[int, float]]) -> dict[int, tuple[int, ...]]:
    """The ``id()`` of each factor of the weights in ``taken`` to the shape that it has at the rank there."""
    weights, shapes = adapted_weights(module), {}
    for name, (rank, alpha) in taken.items():
        layer, weight = weights[name]
        spec = replace(layer.lora_specs[weight], rank=rank, alpha=alpha)
        for factor, shape in zip(layer.lora_pair(weight), layer.factor_shapes(layer, weight, spec), strict=False):
            shapes[id(factor)] = shape
    return shapes
