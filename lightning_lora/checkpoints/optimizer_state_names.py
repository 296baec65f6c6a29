"""Optimizer state keyed by parameter name, so that one checkpoint has the same meaning under every strategy.

Lightning keys it by position: in the optimizer's list if a strategy leaves parameters whole, among *all* parameters of
the module if it shards them. A file of one kind read under the other fails, or gives parameters no state or the state
of others. Names have the same meaning in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import CheckpointFileError, first_five
from lightning_lora.lora.patterns import state_dict_name


def reads_by_name(strategy: Strategy) -> bool:
    """Whether ``strategy`` shards parameters and reads optimizer state by their names."""
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))


def name_optimizer_states(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Key the optimizer states of a ``checkpoint`` in one file by name, in the order of the optimizer's own list."""
    strategy, states = module.trainer.strategy, checkpoint.get("optimizer_states")
    if states is None:
        return
    name_by_id = _name_by_id(module)
    names = _names(name_by_id, (strategy.model or module).parameters()) if reads_by_name(strategy) else None
    checkpoint["optimizer_states"] = [
        _keyed_by_name(state, optimizer, name_by_id, names)
        for optimizer, state in zip(module.trainer.optimizers, states, strict=True)
    ]


def match_optimizer_order(module: LightningModule, states: Sequence[Mapping[str, Any]]) -> None:
    """Reorder named ``states`` like the optimizers that will load them, because torch matches state by order only.

    Raises:
        AdapterFileError: If a group of an optimizer holds other parameters than in the checkpoint.
    """
    name_by_id = _name_by_id(module)
    for optimizer, state in zip(module.trainer.optimizers, states, strict=False):
        for number, (own, saved) in enumerate(
            zip(_group_names(name_by_id, optimizer), state.get("param_groups", ()), strict=False)
        ):
            if not all(isinstance(name, str) for name in saved["params"]):
                continue
            if sorted(map(str, own)) != sorted(saved["params"]):
                odd = first_five(sorted({*map(str, own)} ^ {*saved["params"]}))
                raise CheckpointFileError(
                    f"group {number} of the optimizer holds other parameters than in the checkpoint ({odd}), and would "
                    "continue with their state. Build the optimizer as it was, or load the weights alone."
                )
            saved["params"] = own


def refuse_states_by_position(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse optimizer state keyed by position under a sharded strategy, which counts positions differently.

    Raises:
        AdapterFileError: If it is keyed by position, unless the optimizer holds all parameters in the module's order.
    """
    strategy = module.trainer.strategy
    if not reads_by_name(strategy) or strategy.model is None:
        return
    everything = [id(parameter) for parameter in strategy.model.parameters()]
    for optimizer, state in zip(module.trainer.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        if any(isinstance(key, int) for key in state["state"]) and held != everything:
            raise CheckpointFileError(
                "the optimizer state of this checkpoint is keyed by position, as plain Lightning writes it, and "
                f"{type(strategy).__name__} would give it to other parameters. Resume on one device or DDP first, with "
                "lightning-lora, and save there: every strategy can resume from that file."
            )


def _keyed_by_name(
    state: dict[str, Any], optimizer: Optimizer, name_by_id: Mapping[int, str], names: list[Any] | None
) -> dict[str, Any]:
    """Key the ``state`` of one optimizer by name.

    Args:
        names: Names of all parameters if positions in ``state`` count these; None if they count the optimizer's list.
    """
    # Sharded strategies give the state to rank 0 only, or already by name.
    if not any(isinstance(key, int) for group in state.get("param_groups", ()) for key in group["params"]):
        return state
    groups = _group_names(name_by_id, optimizer)
    if names is None:
        pairs = zip(groups, state["param_groups"], strict=True)
        name_of = {key: name for own, saved in pairs for key, name in zip(saved["params"], own, strict=True)}
    else:
        name_of = dict(enumerate(names))
    return state | {
        "state": {name_of[key]: value for key, value in state["state"].items()},
        "param_groups": [group | {"params": own} for group, own in zip(state["param_groups"], groups, strict=True)],
    }


def _name_by_id(module: LightningModule) -> dict[int, str]:
    """Name in the state dict of each parameter, by its ``id()``."""
    return {id(parameter): state_dict_name(name) for name, parameter in module.named_parameters()}


def _group_names(name_by_id: Mapping[int, str], optimizer: Optimizer) -> list[list[Any]]:
    """Names of the parameters of each group; an unknown one is named by its index in the whole optimizer."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = iter(_names(name_by_id, parameters))
    return [[next(names) for _ in group["params"]] for group in optimizer.param_groups]


def _names(name_by_id: Mapping[int, str], parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Names of ``parameters``; a parameter unknown to the module is named by its index."""
    return [name_by_id.get(id(parameter), index) for index, parameter in enumerate(parameters)]
