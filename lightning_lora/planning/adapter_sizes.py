"""The number of trained parameters at every rank, from the shapes of a module alone."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.base import AdapterSpec
from lightning_lora.lora.layers.quantised_weights import num_elements
from lightning_lora.lora.targets.adaptable import Candidate
from lightning_lora.lora.targets.ranks import rank_divisor
from lightning_lora.lora.targets.resolve import resolve_targets
from lightning_lora.mixin.around_root import split_trainable
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.tasks.pretrained import PretrainedTask


class WeightSize(NamedTuple):
    """What decides how many adapter parameters a weight has.

    Args:
        per_rank: Adapter parameters for each unit of rank, ``in + out`` for a matrix; for experts, of all together.
        full_rank: The highest rank that an update of this weight can have.
        divisor: What the rank is divided by: the active experts of a mixture, else 1.
        fixed: The rank that ``rank_pattern`` gives the weight; 0 if it follows ``rank``.
        magnitudes: Adapter parameters at any rank, one for each output feature with DoRA.
    """

    per_rank: int
    full_rank: int
    divisor: int
    fixed: int
    magnitudes: int = 0

    def parameters(self, rank: int) -> int:
        """Adapter parameters of the weight if the settings say ``rank``."""
        return self.magnitudes + self.per_rank * (self.fixed or min(self.full_rank, max(1, rank // self.divisor)))


@dataclass(frozen=True)
class AdapterSizes:
    """Sizes of the adapters that some settings give a module, at any rank.

    Args:
        weights: The adapted weights, those of equal size counted together.
        trained: Parameters of modules that are trained in full beside the adapters.
    """

    weights: Mapping[WeightSize, int]
    trained: int

    def parameters(self, rank: int) -> int:
        """Trained parameters at a rank: adapters and modules trained in full."""
        return self.trained + sum(count * size.parameters(rank) for size, count in self.weights.items())

    def weights_below(self, rank: int) -> int:
        """The number of weights that cannot hold a rank, and get their full rank instead."""
        return sum(
            count for size, count in self.weights.items() if not size.fixed and rank // size.divisor > size.full_rank
        )

    @property
    def num_weights(self) -> int:
        """The number of adapted weights."""
        return sum(self.weights.values())

    @property
    def num_fixed(self) -> int:
        """The number of weights whose rank ``rank_pattern`` sets."""
        return sum(count for size, count in self.weights.items() if size.fixed)

    @property
    def narrowest(self) -> int:
        """The smaller dimension of the smallest adapted weight."""
        return min(size.full_rank for size in self.weights)


def adapter_sizes(module: nn.Module, config: LoRAConfig) -> AdapterSizes:
    """The sizes of the adapters that `config` gives a module; the module is not changed.

    Args:
        module: A module without adapters, with or without memory for its weights. Of a `LoRAMixin` with a
            ``lora_root`` this root is adapted; of a task that is not built yet, the model of its config.
        config: The settings; their rank plays no part.

    Raises:
        TargetNotFoundError: If a pattern matches nothing.
        ConfigError: If the module is adapted already, or cannot be adapted with these settings.
    """
    root, config, opened = _root(module, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the injection of the run says the same
        targets = resolve_targets(root, config)
        sizes = Counter(_size(root, weight, config) for weight in targets.weights.values())
    trained = [parameter for part in targets.trainable.values() for parameter in part.parameters()]
    return AdapterSizes(sizes, _num_elements([*trained, *opened]))


def refused_ranks(module: nn.Module, config: LoRAConfig, ranks: Iterable[int]) -> set[int]:
    """Which of ``ranks`` `config` refuses for a module: orthogonal factors need an even rank in each layer."""
    if config.init != "orthogonal":
        return set()
    root, config, _ = _root(module, config)
    return {rank for rank in ranks if not _is_possible(root, replace(config, rank=rank))}


def _is_possible(root: nn.Module, config: LoRAConfig) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resolve_targets(root, config)
    except ConfigError:
        return False
    return True


def _root(module: nn.Module, config: LoRAConfig) -> tuple[nn.Module, LoRAConfig, list[nn.Parameter]]:
    """The module to adapt, its settings, and what else of ``module`` is trained in full."""
    if isinstance(module, PretrainedTask) and module.model is None:
        return module._meta_model(), config, []
    if not isinstance(module, LoRAMixin) or not module.lora_root:
        return module, config, []
    root = module._lora_module()
    inside, opened = split_trainable(module, module.lora_root, root, config)
    return root, inside, list(opened.values())


def _size(root: nn.Module, weight: Candidate, config: LoRAConfig) -> WeightSize:
    shape = weight.shape(root)
    one = AdapterSpec(1, 1.0, weight.role, config)
    factors = weight.kind(root).factor_shapes(root.get_submodule(weight.layer), weight.parameter, one)
    return WeightSize(
        per_rank=sum(map(math.prod, factors)),
        full_rank=min(shape.num_in, shape.num_out),
        divisor=rank_divisor(root, weight, config),
        fixed=weight.first_match(config.rank_pattern, 0),
        magnitudes=shape.num_out if config.dora else 0,
    )


def _num_elements(parameters: Iterable[nn.Parameter]) -> int:
    """Elements of parameters, each counted once."""
    return sum(num_elements(parameter) for parameter in {id(each): each for each in parameters}.values())


def with_targets(config: LoRAConfig, targets: str) -> LoRAConfig:
    """The settings for other targets; what is set for single layers stays with the targets it was made for."""
    return replace(config, targets=targets, rank_pattern={}, alpha_pattern={}, lr_multiplier_pattern={})
