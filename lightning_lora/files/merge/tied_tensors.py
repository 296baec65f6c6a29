"""Weights that several layers of a model share, and its checkpoint stores once: what a merge makes of each layer.

If the adapter treats all the layers alike, the stored tensor changes for all of them. If not, they are untied: every
layer gets a tensor of its own, and the config of the merged model says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import AdapterFileError, AdapterFolderError, first_five
from lightning_lora.files.adapter.folder import AdapterFolder
from lightning_lora.files.adapter.peft_format import FactorPair
from lightning_lora.files.json_object import read_json
from lightning_lora.files.merge.row_blocks import BLOCK
from lightning_lora.files.merge.stored_names import CheckpointModel, in_base
from lightning_lora.files.safetensors_file import open_tensors
from lightning_lora.lora.layers.adapted import join

Shapes = Mapping[str, tuple[int, ...]]
Comparison = Callable[[str, str], bool]


@dataclass(frozen=True)
class Fate:
    """What a merge does to one tensor.

    Args:
        trained: The tensor of the adapter that replaces it, or None.
        weight: The adapted weight whose update is added, or None.
        copy: The base weight in the adapter that replaces it before the update, or None.
    """

    trained: str | None = None
    weight: str | None = None
    copy: str | None = None


@dataclass(frozen=True)
class TiedTensors:
    """What a merge does to the tensors of shared weights.

    Args:
        fates: Tensor of the merged checkpoint to what becomes of it.
        sources: Tensor that only the merged checkpoint has, to the stored tensor that it starts as.
        planned: Names in the adapter of the parameters that this decides about.
        declared: Whether the config must say that the weights are not shared any more.
    """

    fates: dict[str, Fate] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    planned: frozenset[str] = frozenset()
    declared: bool = False

    def chosen(self, part: str) -> dict[str, str]:
        """Tensor to the ``trained``, ``weight`` or ``copy`` of its fate, where there is one."""
        return {tensor: name for tensor, fate in self.fates.items() if (name := getattr(fate, part)) is not None}


def plan_tied_tensors(
    folder: AdapterFolder, base: Path, shapes: Shapes, parameters: Mapping[str, str], same: Comparison
) -> TiedTensors:
    """Find the shared weights that ``folder`` changes, and decide what becomes of them.

    Args:
        parameters: Parameter to the adapted weight that it holds, for weights that are single matrices.

    Raises:
        AdapterFileError: If the weights that the model shares cannot be told, and may be among those that change.
    """
    changed = [name for name in chain(parameters, folder.trained, folder.base_copies) if _may_be_shared(name)]
    if not changed or not (base / "config.json").is_file():
        return TiedTensors()
    try:
        model = CheckpointModel(base)
    except AdapterFileError:
        _check_not_vocabulary(folder, base, shapes, changed, "transformers does not know what model it is.")
        return TiedTensors()
    own = {name: model.parameter_name(name) for name in changed}
    outside = [name for name, parameter in own.items() if parameter is None or model.is_inner_name(name)]
    if outside and not folder.manifest.following:
        kind = type(model.module).__name__
        _check_not_vocabulary(folder, base, shapes, outside, f"{base} is a checkpoint of {kind}, which lacks them.")
    ours = {parameter: name for name, parameter in own.items() if parameter is not None}
    groups = [_Group(model, folder, shapes, group, ours, parameters) for group in model.shared()]
    # A group of which nothing is stored or changed is left to others: what is missing is reported with all the rest.
    groups = [group for group in groups if group.stored and not ours.keys().isdisjoint(group.names)]
    untied = [group for group in groups if not group.stays_tied(same)]
    names = {group: group.names if group in untied else list(group.stored) for group in groups}
    return TiedTensors(
        fates={group.tensors[name]: group.fate(name) for group in groups for name in names[group]},
        sources={
            group.tensors[name]: group.source for group in untied for name in group.names if name not in group.stored
        },
        planned=frozenset(own for parameter, own in ours.items() if any(parameter in group.names for group in groups)),
        declared=bool(untied) and model.can_untie,
    )


class _Group:
    """The parameters of a model that share one weight.

    Args:
        names: The parameters, first the one that the others are tied to.
        ours: Parameter to its name in the adapter, for those that the adapter changes.
        weights: Name in the adapter to the adapted weight.

    Attributes:
        stored: Parameter to its tensor in the checkpoint, for those that it holds.
        tensors: Parameter to its tensor in the merged checkpoint.
    """

    def __init__(
        self,
        model: CheckpointModel,
        folder: AdapterFolder,
        shapes: Shapes,
        names: list[str],
        ours: Mapping[str, str],
        weights: Mapping[str, str],
    ) -> None:
        self.names, self._folder, self._ours = names, folder, ours
        self.tensors = {name: model.stored_name(name) or name for name in names}
        found = {name: in_base(tensor, shapes) for name, tensor in self.tensors.items()}
        self.stored = {name: tensor for name, tensor in found.items() if tensor is not None}
        self.tensors |= self.stored
        self._weights = {name: weights[ours[name]] for name in names if ours.get(name) in weights}
        following = {join(layer, "weight") for layer in folder.manifest.following}
        followers = [name for name in names if any(model.parameter_name(other) == name for other in following)]
        # Layers that follow another one get its update too.
        self._weights |= {name: next(iter(self._weights.values())) for name in followers if self._weights}

    @property
    def source(self) -> str:
        """The stored tensor that a parameter without one starts as."""
        return next(iter(self.stored.values()))

    def fate(self, name: str) -> Fate:
        """What becomes of a parameter."""
        copies = [own for other in (name, *self.names) if (own := self._ours.get(other)) in self._folder.base_copies]
        own = self._ours.get(name)
        return Fate(own if own in self._folder.trained else None, self._weights.get(name), next(iter(copies), None))

    def stays_tied(self, same: Comparison) -> bool:
        """Whether all parameters end up equal."""
        first = self.names[0]
        return all(self._are_alike(first, name, same) for name in self.names[1:])

    def _are_alike(self, name: str, other: str, same: Comparison) -> bool:
        one, two = self.fate(name), self.fate(other)
        if one.trained is not None or two.trained is not None:
            return _equal(one.trained, two.trained, self._folder.trained)
        if one.copy is None and two.copy is None:
            tensors = {self.stored.get(name, self.source), self.stored.get(other, self.source)}
            starts_alike = len(tensors) == 1 or same(*tensors)
        else:
            starts_alike = _equal(one.copy, two.copy, self._folder.base_copies)
        return starts_alike and self._same_update(one.weight, two.weight)

    def _same_update(self, one: str | None, two: str | None) -> bool:
        if one == two or one is None or two is None:
            return one == two
        same_scale = self._folder.spec(one).scale == self._folder.spec(two).scale
        return same_scale and all(map(torch.equal, self._stored_factors(one), self._stored_factors(two)))

    def _stored_factors(self, weight: str) -> FactorPair:
        """The factors whose product has the layout of an embedding, ``(rows, rank)`` and ``(rank, columns)``."""
        A, B = self._folder.pairs[weight]
        return (A.T, B.T) if weight in self._folder.embeddings else (B, A)


def _equal(one: str | None, two: str | None, tensors: Mapping[str, Tensor]) -> bool:
    """Whether two names of tensors are given, of equal tensors."""
    return one is not None and two is not None and (one == two or torch.equal(tensors[one], tensors[two]))


def _may_be_shared(name: str) -> bool:
    """Whether a parameter may be one of a group that shares a weight: it is in no numbered block."""
    return not any(part.isdigit() for part in name.split("."))


def _check_not_vocabulary(
    folder: AdapterFolder, base: Path, shapes: Shapes, changed: Iterable[str], reason: str
) -> None:
    """Refuse to change embedding or head of a base that shares them with layers that cannot be told."""
    config = read_json(base / "config.json")
    sizes = {part.get("vocab_size") for part in (config, config.get("text_config", {})) if isinstance(part, dict)}
    tables = [
        name
        for name in changed
        if (tensor := in_base(name, shapes)) is not None and sizes.intersection(shapes[tensor][:1])
    ]
    if tables and config.get("tie_word_embeddings", True) is not False:
        raise AdapterFolderError(
            f"{folder.path} changes {first_five(tables)}, and {base} may share it with other layers: {reason} Load the "
            f"adapter into the model instead, and write it with save_merged."
        )


def equal_tensors(files: Mapping[str, Path], one: str, two: str) -> bool:
    """Whether two stored tensors hold the same elements, read a block at a time."""
    with open_tensors(files[one]) as left, open_tensors(files[two]) as right:
        shape = left.header.tensors[one].shape
        if shape != right.header.tensors[two].shape or left.dtype(one) != right.dtype(two):
            return False
        size = torch.Size(shape).numel()
        starts = range(0, size, BLOCK)
        return all(
            torch.equal(
                *(file.read(name, start, min(start + BLOCK, size)) for file, name in ((left, one), (right, two)))
            )
            for start in starts
        )


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model that shares no weights, and in which no inner model does."""
    # At the top it may be left out, and then mean the default of the model's class.
    return _without_ties(config) | {"tie_word_embeddings": False}


def _without_ties(config: Mapping[str, Any]) -> dict[str, Any]:
    inner = {name: _without_ties(part) for name, part in config.items() if isinstance(part, dict)}
    return dict(config) | inner | ({"tie_word_embeddings": False} if "tie_word_embeddings" in config else {})
