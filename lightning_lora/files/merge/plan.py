"""Which tensors of a checkpoint an adapter changes, and how: decided from names and shapes before any is read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora.errors import AdapterFileError, AdapterFolderError, first_five
from lightning_lora.files.adapter.fit import with_experts
from lightning_lora.files.adapter.folder import AdapterFolder
from lightning_lora.files.adapter.stored_layers import with_model_names
from lightning_lora.files.merge.row_blocks import StoredUpdate, matrix_update
from lightning_lora.files.merge.stored_experts import ExpertPart, FusedWeight, expert_parts, row_numbers
from lightning_lora.files.merge.stored_names import CheckpointModel, in_base
from lightning_lora.files.merge.tied_tensors import Comparison, Shapes, TiedTensors, plan_tied_tensors
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.experts import LoRAFusedExperts
from lightning_lora.lora.layers.linear import LoRAConv1D
from lightning_lora.lora.layers.registry import adapter_kind


@dataclass(frozen=True)
class MergePlan:
    """What a merge does to the tensors of a checkpoint; tensors that are not named stay as they are.

    Args:
        folder: The adapter.
        matrices: Stored tensor to the adapted weight it holds.
        experts: Stored tensor to the part of an adapted weight of fused experts it holds.
        trained: Stored tensor to the tensor of the adapter that replaces it.
        transposed: Adapted matrices that are stored ``(in, out)``, as far as their shapes do not tell.
        copies: Stored tensor to the base weight in the adapter that replaces it before its update is added.
        tied: What becomes of weights that several layers share; all of it is in the other tables too.
    """

    folder: AdapterFolder
    matrices: dict[str, str]
    experts: dict[str, ExpertPart]
    trained: dict[str, str]
    transposed: frozenset[str]
    copies: dict[str, str]
    tied: TiedTensors

    def tensors(self, stored: Iterable[str]) -> dict[str, str]:
        """Tensor of the merged checkpoint to the one of ``stored`` that it starts as, for all of one file."""
        stored = list(stored)
        added = {name: source for name, source in self.tied.sources.items() if source in stored}
        return {name: name for name in stored} | added

    def weight(self, name: str) -> str | None:
        """The adapted weight that a stored tensor holds, whole or in part; None if the tensor has no update."""
        return self.experts[name].fused.name if name in self.experts else self.matrices.get(name)

    def update(self, name: str, shape: tuple[int, ...]) -> StoredUpdate:
        """The update of a stored tensor.

        Raises:
            AdapterFileError: If it does not fit the shape.
        """
        weight = self.weight(name)
        assert weight is not None
        (A, B), scale = self.folder.pairs[weight], self.folder.spec(weight).scale
        magnitude = self.folder.magnitudes.get(weight)
        if name in self.experts:
            return self.experts[name].update(name, A, B, scale, shape)
        entry = self.folder.manifest.layers.get(weight)
        transposed = weight in self.transposed
        kernel_transposed = entry is not None and entry.stored == "transposed kernel matrix"
        return matrix_update(weight, A, B, scale, shape, transposed, kernel_transposed, magnitude)


def plan_merge(folder: AdapterFolder, base: Path, shapes: Shapes, same: Comparison) -> MergePlan:
    """Find the tensors of the checkpoint at ``base`` that ``folder`` changes.

    Args:
        shapes: Name of every stored tensor to its shape.
        same: Whether two stored tensors have equal values.

    Raises:
        AdapterFileError: If something that was adapted is not in the checkpoint, or its vocabulary has another size.
    """
    experts: dict[str, ExpertPart] = {}
    missing: list[str] = []
    if folder.stacked or any(A.ndim == 3 for A, _ in folder.pairs.values()):
        model = CheckpointModel(base)
        folder = with_experts(model.module, folder)
        experts, missing = _experts(model, folder, shapes)
    _refuse_new_weights(folder)
    candidates = {name: _parameters(folder, name) for name, (A, _) in folder.pairs.items() if A.ndim == 2}
    parameters = {parameter: name for name, names in candidates.items() for parameter in names}
    tied = plan_tied_tensors(folder, base, shapes, parameters, same)
    candidates = {name: names for name, names in candidates.items() if tied.planned.isdisjoint(names)}
    whole = {name: (name,) for name in (*folder.trained, *folder.base_copies) if name not in tied.planned}
    found = _found(candidates | whole, shapes)
    lost = {name: names for name, names in candidates.items() if name not in found}
    lost |= {name: whole[name] for name in _not_stored(folder, whole, found)}
    if lost:
        converted = _with_model_names(base, folder, candidates.keys() & lost)
        if converted is not folder:
            return plan_merge(converted, base, shapes, same)
        renamed = _renamed(base, lost, shapes)
        found |= renamed
        lost = {name: names for name, names in lost.items() if name not in renamed}
        own = folder.trained
        pieces = _pieces(base, {name: own[name] for name in lost if name in own}, shapes)
        folder = replace(folder, trained=own | pieces)
        found |= {stored: stored for stored in pieces}
        missing += [name for name in lost if name not in own or not pieces]
    if missing:
        raise AdapterFolderError(
            f"{folder.path} does not fit {base}: {len(missing)} of {len(folder.ranks) + len(folder.trained)} adapted "
            f"weights are not in the checkpoint: {first_five(missing)}. If they are an output layer that the run has "
            "added, `lightning-lora export RUN OUT --format merged` builds the model with it."
        )

    def tensors(names: Collection[str]) -> dict[str, str]:
        return {tensor: name for name, tensor in found.items() if name in names}

    plan = MergePlan(
        folder,
        tensors(candidates) | tied.chosen("weight"),
        experts,
        tensors(folder.trained) | tied.chosen("trained"),
        _transposed(base, folder),
        tensors(folder.base_copies) | tied.chosen("copy"),
        tied,
    )
    _check_copies(plan, base, shapes)
    return plan


def _refuse_new_weights(folder: AdapterFolder) -> None:
    """Refuse updates of weights that are not the base's: a merge on disk adds them to the stored ones."""
    replaced = [name for name in folder.pairs if not folder.trained.keys().isdisjoint(_parameters(folder, name))]
    if replaced:
        raise AdapterFolderError(
            f"{folder.path} holds new base weights under its updates ({first_five(replaced)}), as of a teacher that "
            f"follows the network: load it with load_adapter and write the model with save_merged."
        )


def _transposed(base: Path, folder: AdapterFolder) -> frozenset[str]:
    """Embeddings, and of the square matrices those that GPT-2's Conv1D stores.

    In PEFT's config one flag stands for all layers, and it keeps the value of the last one, so the model is asked.
    """
    square = {
        name
        for name, (A, B) in folder.pairs.items()
        if A.ndim == 2 and A.shape[1] == B.shape[0] and name not in folder.embeddings
    }
    fans_out = bool(folder.peft.get("fan_in_fan_out"))
    if square and (fans_out or not folder.manifest.is_present):
        modules = _modules(base)
        kinds = {name: modules.get(name, modules.get(name.partition(".")[2])) for name in square}
        square = {name for name, kind in kinds.items() if (fans_out if kind is None else issubclass(kind, LoRAConv1D))}
    elif not fans_out:
        square = set()
    return folder.embeddings | square


def _modules(base: Path) -> dict[str, type[LoRALayer]]:
    """The adapted layer for every layer of the model at ``base``; empty if nothing tells which model it is."""
    try:
        model = CheckpointModel(base)
    except AdapterFileError:
        return {}
    kinds = {name: adapter_kind(module) for name, module in model.module.named_modules()}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _with_model_names(base: Path, folder: AdapterFolder, lost: Collection[str]) -> AdapterFolder:
    """The folder with the names of the model for layers that an older model had and this checkpoint does not."""
    if not lost or not (base / "config.json").is_file():
        return folder
    model = CheckpointModel(base).module
    known = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    return with_model_names(model, folder, set(lost) - known)


def _check_copies(plan: MergePlan, base: Path, shapes: Shapes) -> None:
    """Refuse a base whose vocabulary has another size than the base weights in the adapter."""
    for tensor, name in plan.copies.items():
        copy, shape = plan.folder.base_copies[name], shapes[plan.tied.sources.get(tensor, tensor)]
        if copy.shape != shape:
            raise AdapterFolderError(
                f"{plan.folder.path} holds a copy of {name}, shape {tuple(copy.shape)}, which is {shape} in {base}: "
                f"its vocabulary was resized. Load {base}, call model.resize_token_embeddings({len(copy)}), save it, "
                f"and merge into that."
            )


def _not_stored(folder: AdapterFolder, wanted: Collection[str], stored: Collection[str]) -> list[str]:
    """The ``wanted`` whole tensors that are not ``stored``. Of tied weights, a checkpoint may store only one."""
    tensors = folder.trained | folder.base_copies
    kept = [tensors[name] for name in wanted if name in stored]
    return [
        name for name in wanted if name not in stored and not any(torch.equal(tensors[name], other) for other in kept)
    ]


def _parameters(folder: AdapterFolder, weight: str) -> tuple[str, ...]:
    """The names that the parameter of an adapted weight may have in the model."""
    entry = folder.manifest.layers.get(weight)
    if entry is not None:
        return (entry.parameter,)
    if weight in folder.parameters:
        return (folder.parameters[weight],)
    is_fused = folder.pairs[weight][0].ndim == 3
    return (weight,) if is_fused else (f"{weight}.weight", f"{weight}.in_proj_weight")


def _found(candidates: Mapping[str, tuple[str, ...]], shapes: Shapes) -> dict[str, str]:
    """Adapted weight to stored tensor, for the weights that are stored under one of the names they may have."""
    found = {
        name: next((stored for parameter in names if (stored := in_base(parameter, shapes)) is not None), None)
        for name, names in candidates.items()
    }
    return {name: stored for name, stored in found.items() if stored is not None}


def _renamed(base: Path, lost: Mapping[str, tuple[str, ...]], shapes: Shapes) -> dict[str, str]:
    """Adapted weight to stored tensor, for the weights that transformers stores under another name."""
    if not (base / "config.json").is_file():
        return {}
    model = CheckpointModel(base)
    names = {
        name: tuple(stored for parameter in parameters if (stored := model.stored_name(parameter)) is not None)
        for name, parameters in lost.items()
    }
    return _found(names, shapes)


def _pieces(base: Path, trained: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """Tensors trained in full as the checkpoint stores them, such as expert by expert; empty if it lacks one."""
    if not trained or not (base / "config.json").is_file():
        return {}
    try:
        stored = CheckpointModel(base).stored(trained)
    except ValueError:  # it is stored in one tensor with others, which were not trained
        return {}
    places = {name: in_base(name, shapes) for name in stored}
    return {place: stored[name] for name, place in places.items() if place is not None} if all(places.values()) else {}


def _experts(model: CheckpointModel, folder: AdapterFolder, shapes: Shapes) -> tuple[dict[str, ExpertPart], list[str]]:
    """Stored tensor to the part of a weight of fused experts it holds, and the names of missing tensors."""
    fused = {_parameters(folder, name)[0]: name for name, (A, _) in folder.pairs.items() if A.ndim == 3}
    parts: dict[str, ExpertPart] = {}
    missing: list[str] = []
    seen: dict[bytes, Tensor] = {}
    for parameter, name in fused.items():
        weight = _fused_weight(model, folder, parameter, name)
        stored = in_base(parameter, shapes)
        if stored is not None:
            # As in transformers, it is turned only if it does not fit otherwise.
            turned = shapes[stored] != weight.shape
            rows = torch.arange(weight.num_out)
            parts[stored] = ExpertPart(weight, 0, weight.shape[0], rows, weight.transposed != turned)
            continue
        split = expert_parts(weight, model.stored({parameter: row_numbers(weight)}), seen)
        places = {name: in_base(name, shapes) for name in split}
        missing += [name for name, place in places.items() if place is None]
        parts |= {place: split[name] for name, place in places.items() if place is not None}
    return parts, missing


def _fused_weight(model: CheckpointModel, folder: AdapterFolder, parameter: str, name: str) -> FusedWeight:
    """The weight of fused experts as the model has it, after checking that the adapter fits it."""
    layer = model.module.get_submodule(parameter.rpartition(".")[0]) if model.has(parameter) else None
    kind = adapter_kind(layer) if layer is not None else None
    if layer is None or kind is None or not issubclass(kind, LoRAFusedExperts):
        raise AdapterFolderError(f"{type(model.module).__name__} has no fused experts {parameter}, which were adapted.")
    shape, found = kind.weights(layer)[parameter.rpartition(".")[2]], folder.shapes[name]
    if found != shape:
        raise AdapterFolderError(
            f"{name} are {shape.num_experts} experts that map {shape[:2]}, the adapter has {found.num_experts} that "
            f"map {found[:2]}."
        )
    return FusedWeight(name, tuple(getattr(layer, parameter.rpartition(".")[2]).shape), kind.transposed(layer))
