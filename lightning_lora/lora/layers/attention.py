"""Adapted ``nn.MultiheadAttention``, and torch's transformer layers around it.

These modules read weights of their children without calling them: attention always reads its output projection, an
encoder layer reads everything in eval mode (torch's fast path). An update that a child adds when called would then do
nothing. So the class of such a module is swapped too, for one without factors that makes its adapted children take
effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.lora.layers.base import LoRALayer, WeightShape
from lightning_lora.lora.layers.class_swap import base_type, reduce_swapped, swapped_type
from lightning_lora.lora.layers.effective_weights import LoRAEffective, effective_weights
from lightning_lora.lora.layers.quantised_weights import is_quantised


class LoRAMultiheadAttention(LoRAEffective, nn.MultiheadAttention):
    r"""``nn.MultiheadAttention`` with a low-rank update of its input projections: ``W + scale * B A``.

    The packed projection is one weight with one update, as in PEFT. The output projection is another adapted layer;
    this one computes with its effective weight.

    Shape:
        - ``in_proj_weight`` ``(3 E, E)``: ``lora_A`` ``(rank, E)``, ``lora_B`` ``(3 E, rank)``.
        - Where keys or values have other widths: ``q_proj_weight`` ``(E, E)``, ``k_proj_weight`` ``(E, kdim)``,
          ``v_proj_weight`` ``(E, vdim)``, each with ``<weight>_lora_A`` and ``<weight>_lora_B``.
    """

    @classmethod
    @override
    def weights(cls, module: Any) -> dict[str, WeightShape]:
        width = module.embed_dim
        if module._qkv_same_embed_dim:
            return {"in_proj_weight": WeightShape(width, 3 * width)}
        widths = {"q_proj_weight": width, "k_proj_weight": module.kdim, "v_proj_weight": module.vdim}
        return {name: WeightShape(num_in, width) for name, num_in in widths.items()}

    @override
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        with _effective_output_projection(self):
            return super().forward(*args, **kwargs)


class LoRAReader(nn.Module):
    """Base of modules without factors that make the adapters of their children take effect."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduce_swapped(self)


class AttentionReader(LoRAReader, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with only its output projection adapted."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        with _effective_output_projection(self):
            return super().forward(*args, **kwargs)


class EncoderLayerReader(LoRAReader, nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` with adapted children.

    In training, its children are called. In eval, torch may compute the whole layer from the weights of its children;
    here it uses their effective weights, so evaluation behaves as in the base (it returns zeros for padding, for one).
    Where adapters need gradients in eval, the children are called.
    """

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        children = (self.self_attn, self.self_attn.out_proj, self.linear1, self.linear2)
        layers = [child for child in children if isinstance(child, LoRALayer) and child.lora_active]
        if self.training or not layers:
            return super().forward(*args, **kwargs)
        if _need_gradients(layers) or not all(map(_allows_addition, layers)):
            # Torch takes the fast path for two activations only; without one of them it calls the children.
            with _attribute(self, "activation_relu_or_gelu", 0):
                return super().forward(*args, **kwargs)
        with effective_weights(layers):
            return super().forward(*args, **kwargs)


class EncoderReader(LoRAReader, nn.TransformerEncoder):
    """``nn.TransformerEncoder`` with adapted layers.

    In eval, torch may pack padded input into a nested tensor, which only the fast path understands. It decides by the
    weights of the first layer, which are frozen; where adapters need gradients, packing is switched off.
    """

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        layers = [layer for layer in self.modules() if isinstance(layer, LoRALayer) and layer.lora_active]
        if not _need_gradients(layers):
            return super().forward(*args, **kwargs)
        with _attribute(self, "use_nested_tensor", False):
            return super().forward(*args, **kwargs)


_READERS: dict[type[nn.Module], type[LoRAReader]] = {
    nn.MultiheadAttention: AttentionReader,
    nn.TransformerEncoderLayer: EncoderLayerReader,
    nn.TransformerEncoder: EncoderReader,
}


def attach_readers(root: nn.Module) -> None:
    """Swap the class of every module in ``root`` that reads the weights of adapted children."""
    for module in root.modules():
        reader = next((reader for kind, reader in _READERS.items() if isinstance(module, kind)), None)
        if reader is None or isinstance(module, (LoRALayer, LoRAReader)):
            continue
        if any(isinstance(child, LoRALayer) for child in module.modules()):
            module.__class__ = swapped_type(reader, type(module))


def detach_readers(root: nn.Module) -> None:
    """Undo `attach_readers` for every module in ``root`` that has no adapted children any more."""
    for module in root.modules():
        if isinstance(module, LoRAReader) and not any(isinstance(child, LoRALayer) for child in module.modules()):
            module.__class__ = base_type(type(module))  # pyright: ignore[reportAttributeAccessIssue]


def output_projections(root: nn.Module) -> dict[str, str]:
    """Dotted name of the output projection of every ``nn.MultiheadAttention`` to the name of the attention itself."""
    return {
        f"{name}.out_proj" if name else "out_proj": name
        for name, module in root.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }


@contextmanager
def _effective_output_projection(attention: nn.MultiheadAttention) -> Iterator[None]:
    """Give the output projection its effective weight within the context, if it is adapted."""
    projection = attention.out_proj
    with effective_weights([projection] if isinstance(projection, LoRALayer) else []):
        yield


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _allows_addition(layer: LoRALayer) -> bool:
    """Whether updates can be added to the weights: not if they are quantised or sharded, when only their layer can."""
    weights = [getattr(layer, name) for name in layer.lora_specs]
    return all(type(weight) is nn.Parameter and not is_quantised(weight) for weight in weights)


def _need_gradients(layers: Sequence[LoRALayer]) -> bool:
    return torch.is_grad_enabled() and any(
        factor.requires_grad for layer in layers for factor in layer.lora_factors().values()
    )
