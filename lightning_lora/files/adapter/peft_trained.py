"""Modules trained in full, as PEFT's ``modules_to_save`` names them.

PEFT replaces each module whose name *ends* with an entry of the list, by text and without regard to dots, and then asks
the file for every tensor of that module. So an entry must be the outermost module: PEFT finds no tensors of a module
inside another one. Where only a part of a module was trained, or an entry ends the name of another module
(``classifier`` and ``pre_classifier``), the file also holds the tensors that were not trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable

from torch import Tensor, nn

from lightning_lora.errors import first_five
from lightning_lora.lora.layers.adapted import join
from lightning_lora.lora.layers.base import is_factor
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.shards import full_tensor
from lightning_lora.lora.targets.selection import is_inside

# PEFT refuses to replace these, as they have no forward.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class SavedModules:
    """The modules below a root that PEFT must be told to save. Warns of trained tensors that no module can hold.

    Args:
        root: The module that names are relative to. Under sharding every rank must call this.
        trained: Names of the tensors trained in full, parameters and saved buffers.

    Attributes:
        names: The outermost modules that hold what was trained, sorted.
        beside: Name to value of the tensors in these modules that were not trained.
    """

    def __init__(self, root: nn.Module, trained: Collection[str]) -> None:
        self._modules = {plain_name(name): module for name, module in root.named_modules(remove_duplicate=False)}
        self._trained = frozenset(trained)
        saved = self._outermost(name for name in self._around_trained() if self._is_whole(name))
        saved = self._outermost({*saved, *filter(self._can_hold, self._holders(saved))})
        saved = self._outermost({*saved, *filter(self._can_hold, self._mistaken(saved))})
        self._warn_of_differences(saved)
        self.names = sorted(saved)
        held = {name: tensor for module in self.names for name, tensor in self._tensors(module).items()}
        self.beside = {name: full_tensor(tensor) for name, tensor in held.items() if name not in self._trained}

    def _around_trained(self) -> set[str]:
        """The modules that hold a trained tensor, at any depth."""
        return {
            ".".join(parts[:end]) for parts in (name.split(".") for name in self._trained) for end in range(len(parts))
        }

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors in the state dict of a module, factors included, by their names below the root."""
        return {
            plain_name(join(prefix, leaf)): tensor.detach()
            for prefix, child in self._modules[name].named_modules(prefix=name, remove_duplicate=False)
            for leaf, tensor in (*child._parameters.items(), *child._buffers.items())
            if tensor is not None and leaf not in child._non_persistent_buffers_set
        }

    def _can_hold(self, name: str) -> bool:
        """Whether PEFT can save the module: it is not the root or a container, and nothing in it is adapted."""
        tensors = self._tensors(name)
        return (
            bool(name and tensors)
            and not isinstance(self._modules[name], _CONTAINERS)
            and not any(map(is_factor, tensors))
        )

    def _is_whole(self, name: str) -> bool:
        return self._can_hold(name) and self._tensors(name).keys() <= self._trained

    def _holders(self, saved: Collection[str]) -> set[str]:
        """For each trained tensor outside ``saved``, the module that holds it."""
        holders = set()
        for name in self._left_out(saved):
            holder = name.rpartition(".")[0]
            while isinstance(self._modules[holder], _CONTAINERS):
                holder = holder.rpartition(".")[0]
            holders.add(holder)
        return holders

    def _mistaken(self, saved: Collection[str]) -> dict[str, str]:
        """Modules outside the list whose names end with an entry, to that entry."""
        entries = frozenset(saved)
        endings = ((name, name[start:]) for name in self._modules if name not in entries for start in range(len(name)))
        return {name: ending for name, ending in endings if ending in entries}

    def _left_out(self, saved: Collection[str]) -> list[str]:
        return [name for name in self._trained if not is_inside(name.rpartition(".")[0], saved)]

    def _outermost(self, names: Iterable[str]) -> set[str]:
        wanted = set(names)
        return {name for name in wanted if not is_inside(name.rpartition(".")[0], wanted)}

    def _warn_of_differences(self, saved: Collection[str]) -> None:
        reasons = [f"{name}, trained beside layers that are adapted" for name in sorted(self._left_out(saved))]
        reasons += [f"{name}, which it takes for {entry}" for name, entry in self._mistaken(saved).items()]
        if reasons:
            warnings.warn(
                f"PEFT cannot load all that this adapter has trained in full ({first_five(reasons)}): its "
                f"modules_to_save cannot say it. load_adapter loads it; a merged model loads everywhere.",
                stacklevel=5,
            )


def takes_for_classifier(root: nn.Module, saved: Collection[str]) -> bool:
    """Whether PEFT's model for sequence classification can load modules saved as ``saved``.

    It adds ``classifier`` and ``score`` to the list, and fails if the file lacks a module whose name ends with them.
    """
    names = {plain_name(name) for name, _ in root.named_modules()}
    return bool(saved) and {name for name in names if name.endswith(("classifier", "score"))} <= set(saved)
