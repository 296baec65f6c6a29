"""Adapted modules that hold matrices of their own and compute with them as they like, such as routers of experts."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_lora.lora.layers.base import WeightShape, is_factor
from lightning_lora.lora.layers.effective_weights import LoRAEffective


class LoRAMatrices(LoRAEffective):
    r"""A module with a low-rank update of matrices that are its own parameters: it runs with ``W + scale * B A``.

    What the module computes with them is not known here. So no target of `LoRAConfig` selects such a module; only
    adapters that name its parameters are loaded into it.

    Shape:
        - ``W``: ``(out, in)``, ``A``: ``(rank, in)``, ``B``: ``(out, rank)``. Where the module holds several matrices,
          the factors are ``<weight>_lora_A`` and ``<weight>_lora_B``.
    """

    @classmethod
    @override
    def weights(cls, module: Any) -> dict[str, WeightShape]:
        return {
            name: WeightShape(num_in=parameter.shape[1], num_out=parameter.shape[0])
            for name, parameter in module._parameters.items()
            if parameter is not None
            and parameter.ndim == 2
            and parameter.is_floating_point()
            and parameter.element_size() > 1
            and not is_factor(name)
        }
