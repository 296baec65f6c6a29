"""Adapted recurrent layers and cells: RNN, LSTM, GRU."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_lora.lora.layers.base import WeightShape
from lightning_lora.lora.layers.effective_weights import LoRAEffective


class LoRARecurrent(LoRAEffective):
    r"""A recurrent layer or cell with a low-rank update of each of its matrices: ``W + scale * B A``.

    The steps over time run inside torch's kernel, so the update is added to the weights once per call, not to their
    products at every step. Biases have no update.

    Shape:
        - ``weight_ih_l0`` ``(gates * hidden, in)``, ``weight_hh_l0`` ``(gates * hidden, hidden)``, and so on for each
          layer and direction; with a projection also ``weight_hr_l0`` ``(projection, hidden)``.
        - ``<weight>_lora_A``: ``(rank, in of the weight)``, ``<weight>_lora_B``: ``(out of the weight, rank)``.
    """

    _flat_weights: list[Tensor | None]
    _flat_weight_refs: list[Any]

    @classmethod
    @override
    def weights(cls, module: Any) -> dict[str, WeightShape]:
        # Layers list the names of their weights; cells have two.
        names = getattr(module, "_flat_weights_names", ("weight_ih", "weight_hh"))
        shapes = {name: getattr(module, name).shape for name in names if name.startswith("weight_")}
        return {name: WeightShape(shape[1], shape[0]) for name, shape in shapes.items()}

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Layers pass the kernel a list of their weights, which they refresh when a weight is another object. Unless the
        # old list is restored, the effective weights and their graph live on in it until the next call.
        lists = {name: self.__dict__[name] for name in ("_flat_weights", "_flat_weight_refs") if name in self.__dict__}
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__.update(lists)
