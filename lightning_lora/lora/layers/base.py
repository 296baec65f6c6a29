"""What every adapted layer has in common: two factors beside each adapted weight, and how they come and go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.errors import ConfigError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.functional import merged_weight, rounding_loss, uniform_bound, weight_update
from lightning_lora.lora.layers.class_swap import base_type, reduce, swapped_type

FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class AdapterSpec:
    """How one weight is adapted.

    Args:
        rank: Inner dimension of the update.
        alpha: Numerator of the scale.
        role: What the layer is in its model: ``attention``, ``mlp``, ``head``, ...
        config: The settings this layer was adapted with.
    """

    rank: int
    alpha: float
    role: str
    config: LoRAConfig

    @property
    def scale(self) -> float:
        """Factor of ``B A``, dimensionless."""
        return self.config.scale(self.rank, self.alpha)


class WeightShape(NamedTuple):
    """A weight as the matrix its update is added to, or as many of them as there are experts (0: a single matrix)."""

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

    Subclasses say what ``in`` and ``out`` are (`dimensions`, or `weights` where ``weight`` is not the only one), add
    the update in ``forward``, and may lay the update out differently (`weight_delta`).
    """

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    # Adapted weight, by the name of its parameter, to how it is adapted.
    lora_specs: dict[str, AdapterSpec]
    lora_enabled: bool
    # Whether weight and factors are another layer's, which merges them and counts them.
    lora_follows: bool
    # The base weights as they were, kept while updates are folded in: subtracting would not restore them bit for bit.
    lora_base_weights: dict[str, Tensor] | None
    # Is shown what the written-out update is computed from: dropout leaves no other trace of it (`layer_rows`).
    lora_watcher: Callable[[Tensor], None] | None = None

    @staticmethod
    def dimensions(module: Any) -> tuple[int, int]:
        """``(in, out)`` of an unadapted module. Read from its attributes: a sharded or quantised weight has others."""
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
        """What the names of the factors of ``weight`` start with: nothing where it is the only one."""
        return f"{weight}_" if len(cls.weights(module)) > 1 else ""

    @classmethod
    def factor_shapes(cls, module: Any, weight: str, spec: AdapterSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``A`` and ``B`` for a weight of an unadapted module."""
        num_in, num_out, num_experts = cls.weights(module)[weight]
        experts = (num_experts,) if num_experts else ()
        return (*experts, spec.rank, num_in), (*experts, num_out, spec.rank)

    @property
    def lora_spec(self) -> AdapterSpec:
        """How the layer is adapted; where it holds several weights, how the first is."""
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
        """Dropout probability in force now."""
        return self.lora_spec.config.dropout if self.training else 0.0

    def lora_prefix(self, weight: str) -> str:
        """`prefix` of an adapted weight, told from the factors: naming all weights of a layer takes longer."""
        return "" if hasattr(self, "lora_A") else f"{weight}_"

    def lora_pair(self, weight: str = "weight") -> tuple[nn.Parameter, nn.Parameter]:
        """The two factors of an adapted weight."""
        prefix = self.lora_prefix(weight)
        return getattr(self, f"{prefix}lora_A"), getattr(self, f"{prefix}lora_B")

    def lora_factors(self) -> dict[str, nn.Parameter]:
        """All factors, by the name of their attribute: ``lora_A`` and ``lora_B``, or those of several weights."""
        prefixes = [self.lora_prefix(weight) for weight in self.lora_specs]
        return {f"{prefix}{end}": getattr(self, f"{prefix}{end}") for prefix in prefixes for end in FACTORS}

    def weight_delta(self, weight: str = "weight") -> Tensor:
        """``scale * B A`` in the layout of the parameter, at least float32; gradients reach the factors."""
        return weight_update(*self.lora_pair(weight), self.lora_specs[weight].scale)

    def effective_weights(self) -> dict[str, Tensor]:
        """Adapted weight to ``W + scale * B A``, for whoever computes with a weight without calling its layer."""
        return {name: merged_weight(getattr(self, name), self.weight_delta(name)) for name in self.lora_specs}

    @torch.no_grad()
    def merge(self) -> float:
        """Fold the updates into the weights; the parameter objects stay.

        Returns:
            The largest `rounding_loss` of its weights; 0 for those in float32 or wider.
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
        """Initialise the factors only; the base weight comes from elsewhere.

        Sharding strategies call this on layers built without memory.
        """
        self.reset_factors()

    @torch.no_grad()
    def reset_factors(self) -> None:
        """A random, B zero: the adapted layer computes what the base computes."""
        for weight, spec in self.lora_specs.items():
            A, B = self.lora_pair(weight)
            if spec.config.init == "gaussian":
                A.normal_(std=1 / spec.rank)
            else:
                bound = uniform_bound(A.shape[-1])
                A.uniform_(-bound, bound)
            B.zero_()

    @property
    def type_without_adapter(self) -> type[nn.Module]:
        """The class the layer gets when its adapter is taken off: the one it had before."""
        return base_type(type(self))

    def before_detach(self) -> None:
        """Called when the adapter is taken off, before the class changes."""

    @property
    def lora_moved(self) -> bool:
        """Whether training has moved the factors that started at zero."""
        return all(bool(self.lora_pair(weight)[1].detach().any()) for weight in self.lora_specs)

    @override
    def extra_repr(self) -> str:
        """The base layer's, with rank and alpha."""
        own = f"rank={self.lora_spec.rank}, alpha={self.lora_spec.alpha:g}"
        return f"{base}, {own}" if (base := super().extra_repr()) else own

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduce(self)


def is_factor(name: str) -> bool:
    """Whether a dotted parameter name is that of a factor.

    >>> is_factor("layers.0.up_proj.lora_A"), is_factor("experts.down_proj_lora_B"), is_factor("layers.0.weight")
    (True, True, False)
    """
    leaf = name.rpartition(".")[2]
    return leaf in FACTORS or leaf.endswith(("_lora_A", "_lora_B"))


def attach(module: nn.Module, kind: type[LoRALayer], specs: Mapping[str, AdapterSpec]) -> LoRALayer:
    """Swap the class of ``module`` and add its factors, on its device; everything else of it is frozen by the caller.

    Args:
        module: The layer to adapt.
        kind: What it becomes.
        specs: Parameter name to how that weight is adapted.

    Raises:
        ConfigError: If the rank is outside ``[1, min(in, out)]``.
    """
    shapes = {name: kind.weights(module)[name] for name in specs}
    for name, (num_in, num_out, _) in shapes.items():
        if not 1 <= specs[name].rank <= min(num_in, num_out):
            raise ConfigError(
                f"rank must be in [1, {min(num_in, num_out)}] for a ({num_out}, {num_in}) weight, got "
                f"rank={specs[name].rank}."
            )
    layer = adapt(module, kind, specs)
    for name in specs:
        _add_factors(layer, name)
    if not any(factor.is_meta for factor in layer.lora_factors().values()):
        layer.reset_factors()
    return layer


def adapt(module: nn.Module, kind: type[LoRALayer], specs: Mapping[str, AdapterSpec]) -> LoRALayer:
    """Swap the class of ``module``; its factors are the caller's to add."""
    module.__class__ = swapped_type(kind, type(module))
    assert isinstance(module, LoRALayer)
    module.lora_specs = dict(specs)
    module.lora_enabled, module.lora_follows = True, False
    module.lora_base_weights = None
    return module


def _add_factors(layer: LoRALayer, name: str) -> None:
    weight, spec = getattr(layer, name), layer.lora_specs[name]
    # Explicit device and dtype: Lightning changes both defaults around `configure_model`.
    options = {"device": weight.device, "dtype": _factor_dtype(weight.dtype, spec.config)}
    for end, shape in zip(FACTORS, layer.factor_shapes(layer, name, spec), strict=True):
        layer.register_parameter(f"{layer.prefix(layer, name)}{end}", nn.Parameter(torch.empty(shape, **options)))


def detach(layer: LoRALayer) -> None:
    """Take the factors off and give the layer its old class back; a merged layer keeps the merged weight."""
    original = layer.type_without_adapter
    layer.before_detach()
    for name in (*layer.lora_factors(), "lora_specs", "lora_enabled", "lora_follows", "lora_base_weights"):
        delattr(layer, name)
    layer.__class__ = original  # pyright: ignore[reportAttributeAccessIssue]


def _factor_dtype(base: torch.dtype, config: LoRAConfig) -> torch.dtype:
    if config.adapter_dtype is not None:
        return getattr(torch, config.adapter_dtype)
    return torch.promote_types(base, torch.float32) if base.is_floating_point else torch.float32
