"""Tensor parallelism for adapted linear layers: each process computes a part of every layer and of its adapter."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from typing_extensions import override

from lightning_lora.errors import StrategyError, first_five
from lightning_lora.lora.layers.adapted import factor_parameters, lora_layers
from lightning_lora.lora.layers.linear import LoRALinear

# Embedding tables and heads stay whole, which is correct in every model.
_LEFT_WHOLE = {"embedding_rowwise", "colwise_gather_output", "colwise_rep"}


class _Colwise(ColwiseParallel):
    """Each process computes some of the outputs: ``W`` and ``B`` are split by rows, ``A`` is replicated."""

    @override
    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        places = {"weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)}
        _distribute(module, device_mesh, places)


class _Rowwise(RowwiseParallel):
    """Each process holds some of the inputs: ``W`` and ``A`` are split by columns, ``B`` is replicated."""

    @override
    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        places = {"weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate()}
        _distribute(module, device_mesh, places)


_STYLES: dict[str, type[ParallelStyle]] = {"colwise": _Colwise, "rowwise": _Rowwise}


def parallelize_lora(module: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str]) -> nn.Module:
    """Split the linear layers of ``module``, adapted or not; call it after `apply_lora` and before `shard_lora`.

    Args:
        module: The adapted module, with real weights that are equal on all processes.
        mesh: The tensor-parallel part of the strategy's device mesh.
        plan: Patterns of module names to ``"colwise"`` or ``"rowwise"``, as in transformers' ``tp_plan``. Styles for
            embedding tables and heads are ignored: these stay whole.

    Returns:
        The module itself.

    Raises:
        ConfigError: If the plan is empty or contains another style, if an adapter is outside the plan or has dropout,
            if anything but adapters is trained, or if a layer cannot be divided by the number of processes.
    """
    styles = _styles(module, plan)
    _check_adapters(module, styles)
    _check_sizes(module, mesh.size(), styles)
    for name, style in styles.items():
        parallelize_module(module.get_submodule(name), mesh, _STYLES[style]())
    return module


def _styles(module: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Style of each layer that is split, by its name."""
    found = {
        name: style
        for name, _ in module.named_modules()
        for pattern, style in plan.items()
        if fnmatch.fnmatchcase(name, pattern) and style not in _LEFT_WHOLE
    }
    unknown = [f"{name} ({style})" for name, style in found.items() if style not in _STYLES]
    if unknown or not found:
        reason = f"its plan asks for {first_five(unknown)}" if unknown else "there is no plan for it"
        raise StrategyError(
            f"{type(module).__name__} cannot be split by tensor parallelism: {reason}. Only linear layers split "
            f"'colwise' or 'rowwise' are supported: use tensor_parallel_size=1."
        )
    return found


def _check_adapters(module: nn.Module, styles: Mapping[str, str]) -> None:
    layers = lora_layers(module)
    factors = factor_parameters(module).keys()
    full = [name for name, parameter in module.named_parameters() if parameter.requires_grad and name not in factors]
    if full:
        raise StrategyError(
            f"tensor parallelism is for adapters, but {len(full)} parameters are trained in full: {first_five(full)}. "
            f"Use tensor_parallel_size=1."
        )
    outside = [name for name, layer in layers.items() if name not in styles or not isinstance(layer, LoRALinear)]
    if outside:
        raise StrategyError(
            f"{len(outside)} adapted layers are outside the model's tensor-parallel plan: {first_five(outside)}. "
            f"Exclude them, or use tensor_parallel_size=1."
        )
    if any(layer.lora_spec.config.dora for layer in layers.values()):
        raise StrategyError(
            "dora needs the norms of whole rows, which tensor parallelism splits: set dora to False, or use "
            "tensor_parallel_size=1."
        )
    if any(layer.lora_spec.config.dropout for layer in layers.values()):
        raise StrategyError(
            "lora dropout would differ between tensor-parallel processes: set dropout to 0, or use "
            "tensor_parallel_size=1."
        )


def _check_sizes(module: nn.Module, num_processes: int, styles: Mapping[str, str]) -> None:
    sides: dict[str, Any] = {name: module.get_submodule(name) for name in styles}
    odd = [
        f"{name} ({count})"
        for name, layer in sides.items()
        if (count := layer.out_features if styles[name] == "colwise" else layer.in_features) % num_processes
    ]
    if odd:
        raise StrategyError(
            f"{num_processes} tensor-parallel processes cannot divide {first_five(odd)} evenly: set a "
            "tensor_parallel_size that divides these sizes."
        )


def _distribute(module: nn.Module, mesh: DeviceMesh, places: Mapping[str, Placement]) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        whole = distribute_tensor(parameter.detach(), mesh, [places[name]])
        module.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
