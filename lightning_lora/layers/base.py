"""What every adapted layer has in common: two factors beside ``weight``, and how they come and go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.functional import merged_weight, uniform_bound, weight_update


@dataclass(frozen=True)
class AdapterSpec:
    """How one layer is adapted.

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


class LoRALayer(nn.Module):
    """Base of adapted layers: a frozen ``weight`` plus ``lora_A`` ``(rank, in)`` and ``lora_B`` ``(out, rank)``.

    An adapted layer is the very module it was before: its class is swapped for a subclass that adds the update, so
    ``isinstance``, hooks, tied references and base checkpoints keep working. The factors are bare parameters because
    precision plugins replace every ``nn.Linear`` child they find.

    Subclasses say what ``in`` and ``out`` are (`dimensions`), add the update in ``forward``, and may lay the update
    out differently (`weight_delta`).
    """

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_spec: AdapterSpec
    lora_enabled: bool
    # The base weight as it was, kept while the update is folded in: subtracting would not restore it bit for bit.
    lora_base_weight: Tensor | None

    @staticmethod
    def dimensions(module: Any) -> tuple[int, int]:
        """``(in, out)`` of an unadapted module. Read from its attributes: a sharded or quantised weight has others."""
        raise NotImplementedError

    @property
    def lora_active(self) -> bool:
        """Whether ``forward`` must add the update: neither disabled nor already folded in."""
        return self.lora_enabled and self.lora_base_weight is None

    @property
    def lora_dropout(self) -> float:
        """Dropout probability in force now."""
        return self.lora_spec.config.dropout if self.training else 0.0

    def weight_delta(self) -> Tensor:
        """``scale * B A`` in the layout of ``weight``, at least float32."""
        return weight_update(self.lora_A.detach(), self.lora_B.detach(), self.lora_spec.scale)

    def merge(self) -> None:
        """Fold the update into ``weight``; the parameter object stays."""
        self.lora_base_weight = self.weight.detach().clone()
        self.weight.data.copy_(merged_weight(self.lora_base_weight, self.weight_delta().to(self.weight.device)))

    def unmerge(self) -> None:
        """Restore ``weight`` bit for bit."""
        assert self.lora_base_weight is not None
        self.weight.data.copy_(self.lora_base_weight)
        self.lora_base_weight = None

    def reset_parameters(self) -> None:
        """Initialise the factors only; the base weight comes from elsewhere.

        Sharding strategies call this on layers built without memory.
        """
        self.reset_factors()

    @torch.no_grad()
    def reset_factors(self) -> None:
        """A random, B zero: the adapted layer computes what the base computes."""
        if self.lora_spec.config.init == "gaussian":
            self.lora_A.normal_(std=1 / self.lora_spec.rank)
        else:
            bound = uniform_bound(self.lora_A.shape[-1])
            self.lora_A.uniform_(-bound, bound)
        self.lora_B.zero_()

    @property
    def type_without_adapter(self) -> type[nn.Module]:
        """The class the layer gets when its adapter is taken off: the one it had before."""
        return base_type(type(self))

    def before_detach(self) -> None:
        """Called when the adapter is taken off, before the class changes."""

    @property
    def lora_moved(self) -> bool:
        """Whether training has moved the factor that started at zero."""
        return bool(self.lora_B.detach().any())

    @override
    def extra_repr(self) -> str:
        """The base layer's, with rank and alpha."""
        return f"{super().extra_repr()}, rank={self.lora_spec.rank}, alpha={self.lora_spec.alpha:g}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Adapted classes of subclassed layers are made on the fly and cannot be found by name; rebuild them.
        return _rebuild, (_kind(type(self)), base_type(type(self))), self.__dict__.copy()


_ADAPTED: dict[tuple[type[LoRALayer], type[nn.Module]], type[LoRALayer]] = {}


def adapted_type(kind: type[LoRALayer], module_type: type[nn.Module]) -> type[LoRALayer]:
    """The class an adapted ``module_type`` has: ``kind`` itself, or ``kind`` mixed into the user's subclass."""
    if (kind, module_type) not in _ADAPTED:
        bases = (kind,) if issubclass(kind, module_type) else (kind, module_type)
        made = kind if len(bases) == 1 else type(f"LoRA{module_type.__name__}", bases, {"__module__": kind.__module__})
        _ADAPTED[kind, module_type] = made
    return _ADAPTED[kind, module_type]


def base_type(adapted: type) -> type[nn.Module]:
    """The class an adapted layer had before."""
    return _origin(adapted)[1]


def _kind(adapted: type) -> type[LoRALayer]:
    return _origin(adapted)[0]


def _origin(adapted: type) -> tuple[type[LoRALayer], type[nn.Module]]:
    # A sharding wrapper may have put its own class on top, hence the walk over the bases.
    for candidate in adapted.__mro__:
        for origin, made in _ADAPTED.items():
            if made is candidate:
                return origin
    raise ConfigError(f"{adapted.__name__} is not an adapted layer.")


def _rebuild(kind: type[LoRALayer], module_type: type[nn.Module]) -> LoRALayer:
    made = adapted_type(kind, module_type)
    return made.__new__(made)


def attach(module: nn.Module, kind: type[LoRALayer], spec: AdapterSpec) -> LoRALayer:
    """Swap the class of ``module`` and add its factors, on its device; everything else of it is frozen by the caller.

    Raises:
        ConfigError: If the rank is outside ``[1, min(in, out)]``.
    """
    num_in, num_out = kind.dimensions(module)
    if not 1 <= spec.rank <= min(num_in, num_out):
        raise ConfigError(
            f"rank must be in [1, {min(num_in, num_out)}] for a ({num_out}, {num_in}) weight, got rank={spec.rank}."
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    dtype = _factor_dtype(weight.dtype, spec.config)
    module.__class__ = adapted_type(kind, type(module))
    assert isinstance(module, LoRALayer)
    module.lora_spec = spec
    module.lora_enabled = True
    module.lora_base_weight = None
    # Explicit device and dtype: Lightning changes both defaults around `configure_model`.
    module.lora_A = nn.Parameter(torch.empty(spec.rank, num_in, device=weight.device, dtype=dtype))
    module.lora_B = nn.Parameter(torch.empty(num_out, spec.rank, device=weight.device, dtype=dtype))
    if weight.device.type != "meta":
        module.reset_factors()
    return module


def detach(layer: LoRALayer) -> None:
    """Take the factors off and give the layer its old class back; a merged layer keeps the merged weight."""
    original = layer.type_without_adapter
    layer.before_detach()
    for name in ("lora_A", "lora_B", "lora_spec", "lora_enabled", "lora_base_weight"):
        delattr(layer, name)
    layer.__class__ = original  # pyright: ignore[reportAttributeAccessIssue]


def _factor_dtype(base: torch.dtype, config: LoRAConfig) -> torch.dtype:
    if config.adapter_dtype is not None:
        return getattr(torch, config.adapter_dtype)
    return torch.promote_types(base, torch.float32) if base.is_floating_point else torch.float32
