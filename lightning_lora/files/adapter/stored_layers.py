"""Adapters whose names are those of checkpoints, not of the model: one LoRA for each expert, or layers renamed since.

Transformers 4 built mixtures of experts from one linear layer for each matrix of each expert, and adapters trained
there name them so. Transformers 5 fuses them, and knows from which tensors of a checkpoint each fused weight is made.
Where these tensors are matrices of single experts, adapters of those matrices are put together in the same way::

    W = [W_gate; W_up]    A = [A_gate; A_up]    B = [[B_gate, 0], [0, B_up]]

The fused update is the sum of the single ones, exactly. Its rank is the sum of their ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterFolderError, first_five
from lightning_lora.files.adapter.folder import AdapterFolder
from lightning_lora.files.adapter.peft_patterns import TargetedNames
from lightning_lora.files.merge.stored_experts import ExpertPart, FusedWeight, expert_parts, row_numbers
from lightning_lora.files.merge.stored_names import CheckpointModel
from lightning_lora.lora.layers.adapted import join
from lightning_lora.lora.layers.base import FACTORS
from lightning_lora.lora.layers.experts import LoRAFusedExperts
from lightning_lora.lora.layers.registry import adapter_kind
from lightning_lora.lora.targets.roles import hugging_face_models


def with_model_names(root: nn.Module, folder: AdapterFolder, unknown: Iterable[str]) -> AdapterFolder:
    """``folder`` with adapted layers that ``root`` does not have brought to the layers that transformers made of them.

    Args:
        root: The model to load into, or one like it without values.
        unknown: Adapted layers that ``root`` does not have. Those that transformers does not know either stay.

    Raises:
        AdapterFileError: If the adapter lacks some of the experts that it should hold.
    """
    names = set(unknown)
    if not names or folder.manifest.is_present or not any(model is root for _, model in hugging_face_models(root)):
        return folder
    model = CheckpointModel.like(root)
    fused = {
        weight: parts for weight, parts in _stored_matrices(model.module, model).items() if not names.isdisjoint(parts)
    }
    for parts in fused.values():
        _check_complete(folder, parts)
        names.difference_update(parts)
    folder = _fused(folder, fused)
    renamed = {old: new for old, new in _renamed(model, names).items() if old in names}
    return folder.renamed(renamed) if renamed else folder


def _stored_matrices(module: nn.Module, model: CheckpointModel) -> dict[str, dict[str, ExpertPart]]:
    """Weight of fused experts to the layers that checkpoints have instead, each with its part of the weight."""
    found = {}
    seen: dict[bytes, Tensor] = {}
    for layer, child in module.named_modules():
        kind = adapter_kind(child)
        if kind is None or not issubclass(kind, LoRAFusedExperts):
            continue
        for name in kind.weights(child):
            weight = FusedWeight(join(layer, name), tuple(getattr(child, name).shape), kind.transposed(child))
            parts = expert_parts(weight, model.stored({weight.name: row_numbers(weight)}), seen)
            found[weight.name] = {
                stored.removesuffix(".weight"): part
                for stored, part in parts.items()
                if stored.endswith(".weight") and part.num_experts == 1 and not part.transposed
            }
    return found


def _check_complete(folder: AdapterFolder, parts: Mapping[str, ExpertPart]) -> None:
    """Refuse an adapter that has tensors of some experts only, though its config names all of them."""
    targeted = TargetedNames(folder.peft)
    lost = [name for name in parts if name not in folder.ranks and name in targeted]
    if lost:
        raise AdapterFolderError(
            f"{folder.path} does not fit this module: its config names {len(lost)} experts that its tensors leave "
            f"out ({first_five(lost)})."
        )


@dataclass(frozen=True)
class _Single:
    """The adapter of one matrix of one expert."""

    part: ExpertPart
    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.A)


def _fused(folder: AdapterFolder, weights: Mapping[str, Mapping[str, ExpertPart]]) -> AdapterFolder:
    """The folder with one adapter for each of the fused weights, in place of those of single experts."""
    factors, alphas, gone = {}, {}, set()
    for weight, parts in weights.items():
        single = {
            name: _Single(part, *folder.pairs[name], folder.spec(name).scale)
            for name, part in parts.items()
            if name in folder.pairs
        }
        _check_shapes(folder, single)
        scale = next(iter(single.values())).scale
        A, B = _put_together(list(single.values()), scale)
        factors |= {f"{weight}_{factor}": tensor for factor, tensor in zip(FACTORS, (A, B), strict=True)}
        rank = A.shape[1]
        alphas[weight] = scale * (math.sqrt(rank) if folder.config.scaling == "rslora" else rank)
        gone.update(single)
    return folder.replaced(gone, factors, alphas) if factors else folder


def _check_shapes(folder: AdapterFolder, single: Mapping[str, _Single]) -> None:
    for name, own in single.items():
        expected = (own.part.fused.num_in, len(own.part.rows))
        if (own.A.shape[-1], own.B.shape[0]) != expected:
            raise AdapterFolderError(
                f"{folder.path} does not fit this module: {name} maps {expected}, the adapter "
                f"{(own.A.shape[-1], own.B.shape[0])}."
            )


def _put_together(single: list[_Single], scale: float) -> tuple[Tensor, Tensor]:
    """``A`` ``(experts, rank, in)`` and ``B`` ``(experts, out, rank)`` of a fused weight, for updates of one ``scale``.

    Matrices that hold the same outputs of their experts, such as all gates, share a range of the rank.
    """
    ranks: dict[bytes, int] = {}
    for own in single:
        key = own.part.rows.numpy().tobytes()
        ranks[key] = max(ranks.get(key, 0), own.rank)
    starts = dict(zip(ranks, torch.tensor([0, *ranks.values()]).cumsum(0).tolist(), strict=False))
    fused, rank = single[0].part.fused, sum(ranks.values())
    A = single[0].A.new_zeros(fused.shape[0], rank, fused.num_in)
    B = single[0].B.new_zeros(fused.shape[0], fused.num_out, rank)
    for own in single:
        start = starts[own.part.rows.numpy().tobytes()]
        place = slice(start, start + own.rank)
        A[own.part.first, place] = own.A
        B[own.part.first, own.part.rows, place] = own.B if own.scale == scale else own.B * (own.scale / scale)
    return A, B


def _renamed(model: CheckpointModel, names: set[str]) -> dict[str, str]:
    """Layer by its name in checkpoints to its name in the model, for matrices that are stored as they are."""
    if not names:
        return {}
    stored = {
        parameter: other
        for parameter, tensor in model.module.named_parameters()
        if tensor.ndim >= 2 and (other := model.stored_name(parameter)) is not None
    }
    return {other.removesuffix(".weight"): name.removesuffix(".weight") for name, other in stored.items()}
