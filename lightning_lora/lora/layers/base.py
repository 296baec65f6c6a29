"""Base of every adapted layer: two factors beside each adapted weight, and how they are added and removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.errors import LayerError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.functional import merged_weight, rounding_loss, weight_update
from lightning_lora.lora.layers import first_values
from lightning_lora.lora.layers.class_swap import base_type, reduce_swapped, swapped_type

FACTORS = ("lora_A", "lora_B")
_SET = ("lora_specs", "lora_enabled", "lora_follows", "lora_held", "lora_keeps_gate", "lora_base_weights")
MAGNITUDE = "lora_magnitude"


@dataclass(frozen=True)
class AdapterSpec:
    """How one weight is adapted.

    Args:
        rank: Inner dimension of the update.
        alpha: Numerator of the scale.
        role: Role of the layer in its model: ``attention``, ``mlp``, ``head``, ...
        config: The settings this layer was adapted with.
        start: Number of components of the factors that stay as they start, within ``rank``; see `first_values`.
    """

    rank: int
    alpha: float
    role: str
    config: LoRAConfig
    start: int = 0

    @property
    def scale(self) -> float:
        """Factor of ``B A``, dimensionless."""
        return self.config.scale(self.rank, self.alpha)


class WeightShape(NamedTuple):
    """Shape of the matrix that an update is added to; fused experts have ``num_experts`` matrices, other weights 0."""

    num_in: int
    num_out: int
    num_experts: int = 0


class LoRALayer(nn.Module):
    """Base of adapted layers: frozen weights, each with ``lora_A`` ``(rank, in)`` and ``lora_B`` ``(out, rank)``.

    An adapted layer is the very module it was before: its class is swapped for a subclass that adds the update, so
    ``isinstance``, hooks, tied references and base checkpoints keep working. The factors are bare parameters because
    precision plugins replace every ``nn.Linear`` child they find.

    Where a layer holds several weights (fused experts, recurrent layers) the factors are called
    ``<weight>_lora_A`` and ``<weight>_lora_B``; experts have one factor each, ``(experts, rank, in)`` and
    ``(experts, out, rank)``.

    A subclass returns ``in`` and ``out`` (`dimensions`, or `weights` where ``weight`` is not the only one) and adds the
    update in ``forward``. It overrides `weight_delta` where the parameter is laid out in another way.
    """

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    # Name of each adapted parameter to how it is adapted.
    lora_specs: dict[str, AdapterSpec]
    lora_enabled: bool
    # Whether weight and factors belong to another layer, which merges and counts them.
    lora_follows: bool
    # Whether the factors are frozen on purpose: the layer is in a copy that the user froze (see `lora.frozen_copies`).
    lora_held: bool
    lora_keeps_gate: bool  # See `keep_gates`.
    # Copies of the base weights while updates are folded in: subtracting would not restore them bit for bit.
    lora_base_weights: dict[str, Tensor] | None
    zero_factor = "lora_B"  # The factor that starts at zero, which LoRA+ trains at a higher rate.
    # Called with the input of the written-out update, after dropout, of which there is no other trace.
    lora_watcher: Callable[[Tensor], None] | None = None

    @staticmethod
    def dimensions(module: Any) -> tuple[int, int]:
        """``(in, out)`` of an unadapted module; sharded or quantised weights may have other shapes."""
        raise NotImplementedError

    @classmethod
    def weights(cls, module: Any) -> dict[str, WeightShape]:
        """The weights of an unadapted module that this kind can adapt, by parameter name."""
        return {"weight": WeightShape(*cls.dimensions(module))}

    @classmethod
    def takes_dropout(cls, module: Any) -> bool:
        """Whether dropout can act on the input of an unadapted module's update."""
        return True

    @classmethod
    def prefix(cls, module: Any, weight: str) -> str:
        """Prefix of the names of the factors of ``weight``; empty where it is the only weight."""
        return f"{weight}_" if len(cls.weights(module)) > 1 else ""

    @classmethod
    def factor_shapes(cls, module: Any, weight: str, spec: AdapterSpec) -> tuple[tuple[int, ...], ...]:
        """Shapes of ``A`` and ``B`` for a weight of an unadapted module, and of the magnitude where there is one."""
        num_in, num_out, num_experts = cls.weights(module)[weight]
        experts = (num_experts,) if num_experts else ()
        return (*experts, spec.rank, num_in), (*experts, num_out, spec.rank)

    @property
    def lora_spec(self) -> AdapterSpec:
        """How the layer is adapted; where it holds several weights, how the first one is."""
        return next(iter(self.lora_specs.values()))

    @property
    def lora_merged(self) -> bool:
        """Whether the updates are folded into the weights."""
        return self.lora_base_weights is not None

    @property
    def lora_active(self) -> bool:
        """Whether ``forward`` must add the update: neither disabled nor already folded in."""
        return self.lora_enabled and not self.lora_merged

    @property
    def lora_dropout(self) -> float:
        """Current dropout probability: 0 outside training."""
        return self.lora_spec.config.dropout if self.training else 0.0

    def lora_prefix(self, weight: str) -> str:
        """`prefix` of an adapted weight, from the names of the factors, which is faster than naming all weights."""
        return "" if hasattr(self, "lora_A") else f"{weight}_"

    def lora_pair(self, weight: str = "weight") -> tuple[nn.Parameter, nn.Parameter]:
        """The two factors of an adapted weight."""
        prefix = self.lora_prefix(weight)
        return getattr(self, f"{prefix}lora_A"), getattr(self, f"{prefix}lora_B")

    def lora_factors(self) -> dict[str, nn.Parameter]:
        """Attribute name to factor: ``lora_A`` and ``lora_B``, or those of several weights; and a magnitude if any."""
        prefixes = [self.lora_prefix(weight) for weight in self.lora_specs]
        return {f"{prefix}{end}": getattr(self, f"{prefix}{end}") for prefix in prefixes for end in FACTORS}

    def update_pair(self, weight: str = "weight") -> tuple[Tensor, Tensor]:
        """The two factors to compute with: no gradient flows to the components that stay as they start."""
        A, B = self.lora_pair(weight)
        start = self.lora_specs[weight].start
        return first_values.without_gradients(A, B, start) if start else (A, B)

    def base_matrix(self, weight: str = "weight") -> Tensor:
        """The base weight as ``(out, in)``, for experts ``(experts, out, in)``."""
        return getattr(self, weight)

    def weight_delta(self, weight: str = "weight") -> Tensor:
        """``scale * B A`` in the layout of the parameter and at least float32, differentiable by the factors."""
        return weight_update(*self.update_pair(weight), self.lora_specs[weight].scale)

    def effective_weights(self) -> dict[str, Tensor]:
        """Name of each adapted weight to ``W + scale * B A``, for code that reads weights without calling the layer."""
        return {name: merged_weight(getattr(self, name), self.weight_delta(name)) for name in self.lora_specs}

    @torch.no_grad()
    def merge(self) -> float:
        """Fold the updates into the weights; the parameter objects stay.

        Returns:
            The largest `rounding_loss` of the weights; 0 for weights in float32 or wider.
        """
        kept, losses = {}, [0.0]
        for name in () if self.lora_follows else self.lora_specs:
            weight = getattr(self, name)
            kept[name] = weight.detach().clone()
            delta = self.weight_delta(name).to(weight.device)
            weight.data.copy_(merged_weight(kept[name], delta))
            if weight.element_size() < 4:
                losses.append(rounding_loss(kept[name], weight.detach(), delta))
        self.lora_base_weights = kept
        return max(losses)

    def unmerge(self) -> None:
        """Restore the weights bit for bit."""
        assert self.lora_base_weights is not None
        for name, base in self.lora_base_weights.items():
            getattr(self, name).data.copy_(base)
        self.lora_base_weights = None

    def reset_parameters(self) -> None:
        """Initialise the factors only; the base weight is loaded.

        Sharding strategies call this method on layers built without memory, which need not have base weights yet.

        Raises:
            ConfigError: If the factors start from the values of the base weights.
        """
        if any(spec.start and spec.config.init == "pissa" for spec in self.lora_specs.values()):
            raise LayerError(first_values.NO_WEIGHTS.format("pissa"))
        self.reset_factors()

    @torch.no_grad()
    def reset_factors(self) -> None:
        """Set the factors to first values with which the adapted layer computes what the base computes."""
        for weight, spec in self.lora_specs.items():
            A, B = self.lora_pair(weight)
            first_values.draw_factors(A, B, spec.config.init, spec.start)
            if spec.start and spec.config.init == "pissa":
                first_values.set_principal_factors(A, B, self.base_matrix(weight), spec.scale, spec.start)

    @property
    def type_without_adapter(self) -> type[nn.Module]:
        """The class that the layer gets when its adapter is removed: the one it had before."""
        return base_type(type(self))

    def before_detach(self) -> None:
        """Prepare the removal of the adapter; called before the class changes."""

    @property
    def lora_moved(self) -> bool:
        """Whether training has changed the updates, which started at zero."""
        return all(first_values.has_update(*self.lora_pair(w), spec.config.init) for w, spec in self.lora_specs.items())

    @override
    def extra_repr(self) -> str:
        """Add rank and alpha to the base layer's."""
        own = f"rank={self.lora_spec.rank}, alpha={self.lora_spec.alpha:g}"
        return f"{base}, {own}" if (base := super().extra_repr()) else own

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduce_swapped(self)


def is_factor(name: str) -> bool:
    """Whether a dotted parameter name belongs to a factor or a magnitude.

    >>> is_factor("layers.0.up_proj.lora_A"), is_factor("experts.down_proj_lora_B"), is_factor("layers.0.weight")
    (True, True, False)
    """
    leaf = name.rpartition(".")[2]
    return leaf in (*FACTORS, MAGNITUDE) or leaf.endswith(("_lora_A", "_lora_B"))


def attach(module: nn.Module, kind: type[LoRALayer], specs: Mapping[str, AdapterSpec]) -> LoRALayer:
    """Swap the class of ``module`` and add its factors, on its device; the caller freezes its other parameters.

    The rank may be above what the weight can hold, as in adapters of other software; `adapter_specs` limits new ones.

    Raises:
        ConfigError: If a rank is below 1.
    """
    for name, spec in specs.items():
        if spec.rank < 1:
            raise LayerError(f"rank must be at least 1 for {name!r} of {type(module).__name__}, got rank={spec.rank}.")
    layer = swap_class(module, kind, specs)
    for name in specs:
        _add_factors(layer, name)
    if not any(factor.is_meta for factor in layer.lora_factors().values()):
        layer.reset_factors()
    return layer


def swap_class(module: nn.Module, kind: type[LoRALayer], specs: Mapping[str, AdapterSpec]) -> LoRALayer:
    """Swap the class of ``module`` as `attach` does; the caller adds the factors."""
    module.__class__ = swapped_type(kind, type(module))
    assert isinstance(module, LoRALayer)
    module.lora_specs = dict(specs)
    module.lora_enabled, module.lora_follows, module.lora_held = True, False, False
    module.lora_keeps_gate, module.lora_base_weights = False, None
    return module


def _add_factors(layer: LoRALayer, name: str) -> None:
    weight, spec = getattr(layer, name), layer.lora_specs[name]
    # Explicit device and dtype: Lightning changes both defaults around `configure_model`.
    options = {"device": weight.device, "dtype": _factor_dtype(weight.dtype, spec.config)}
    for end, shape in zip((*FACTORS, MAGNITUDE), layer.factor_shapes(layer, name, spec), strict=False):
        layer.register_parameter(f"{layer.prefix(layer, name)}{end}", nn.Parameter(torch.empty(shape, **options)))


def detach(layer: LoRALayer) -> None:
    """Remove the factors and give the layer its old class back; a merged layer keeps the merged weight."""
    original = layer.type_without_adapter
    layer.before_detach()
    for name in (*layer.lora_factors(), *_SET):
        delattr(layer, name)
    layer.__class__ = original  # pyright: ignore[reportAttributeAccessIssue]


def _factor_dtype(base: torch.dtype, config: LoRAConfig) -> torch.dtype:
    if config.adapter_dtype is not None:
        return getattr(torch, config.adapter_dtype)
    return torch.promote_types(base, torch.float32) if base.is_floating_point else torch.float32
