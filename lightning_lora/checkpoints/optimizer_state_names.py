"""Optimizer state keyed by parameter name, so that one checkpoint means the same to every strategy.

Lightning keys it by position: in the optimizer's own list where a strategy leaves parameters whole, among *all*
parameters of the module where it shards them. A file of the one kind read by the other fails, or gives some parameters
no state and others that of their neighbours. Names mean the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import AdapterFileError, first_five
from lightning_lora.lora.patterns import state_dict_name


def reads_by_name(strategy: Strategy) -> bool:
    """Whether ``strategy`` shards parameters and reads optimizer state by their names."""
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))


def name_optimizer_states(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Key the optimizer state in a ``checkpoint`` of one file by name, in the order of the optimizer's own list."""
    strategy, states = module.trainer.strategy, checkpoint.get("optimizer_states")
    if states is None:
        return
    name_of = _names(module)
    everything = _in_order(name_of, (strategy.model or module).parameters()) if reads_by_name(strategy) else None
    checkpoint["optimizer_states"] = [
        _named(name_of, optimizer, state, everything)
        for optimizer, state in zip(module.trainer.optimizers, states, strict=True)
    ]


def follow_optimizers(module: LightningModule, states: Sequence[Mapping[str, Any]]) -> None:
    """Bring named states into the order of the optimizers that will read them: torch goes by order alone.

    Raises:
        AdapterFileError: If a group of an optimizer holds other parameters than it did.
    """
    name_of = _names(module)
    for optimizer, state in zip(module.trainer.optimizers, states, strict=False):
        for number, (group, saved) in enumerate(
            zip(optimizer.param_groups, state.get("param_groups", ()), strict=False)
        ):
            if not all(isinstance(name, str) for name in saved["params"]):
                continue
            own = _in_order(name_of, group["params"])
            if sorted(map(str, own)) != sorted(saved["params"]):
                odd = first_five(sorted({*map(str, own)} ^ {*saved["params"]}))
                raise AdapterFileError(
                    f"group {number} of the optimizer holds other parameters than in the checkpoint ({odd}), and would "
                    "go on with another's state. Build the optimizer as it was, or load the weights alone."
                )
            saved["params"] = own


def refuse_misread_positions(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a file of positions in an optimizer's list that a sharded strategy has taken for another's.

    Raises:
        AdapterFileError: If it is one, unless the optimizer holds all parameters in their order.
    """
    strategy = module.trainer.strategy
    if not reads_by_name(strategy) or strategy.model is None:
        return
    everything = [id(parameter) for parameter in strategy.model.parameters()]
    for optimizer, state in zip(module.trainer.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        if any(isinstance(key, int) for key in state["state"]) and held != everything:
            raise AdapterFileError(
                "the optimizer state of this checkpoint is keyed by position, as plain Lightning writes it, and "
                f"{type(strategy).__name__} would give it to other parameters. Resume on one device or DDP first, with "
                "lightning-lora, and save there: that file goes anywhere."
            )


def _named(
    names: Mapping[int, str], optimizer: Optimizer, state: dict[str, Any], everything: list[Any] | None
) -> dict[str, Any]:
    # Sharded strategies give the state to rank 0 only, or by name already.
    if not any(isinstance(key, int) for group in state.get("param_groups", ()) for key in group["params"]):
        return state
    groups = [_in_order(names, group["params"]) for group in optimizer.param_groups]
    if everything is None:
        pairs = zip(groups, state["param_groups"], strict=True)
        name_of = {key: name for own, saved in pairs for key, name in zip(saved["params"], own, strict=True)}
    else:
        name_of = dict(enumerate(everything))
    return state | {
        "state": {name_of[key]: value for key, value in state["state"].items()},
        "param_groups": [group | {"params": own} for group, own in zip(state["param_groups"], groups, strict=True)],
    }


def _names(module: LightningModule) -> dict[int, str]:
    """Name in the state dict of each parameter, by its id."""
    return {id(parameter): state_dict_name(name) for name, parameter in module.named_parameters()}


def _in_order(names: Mapping[int, str], parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Names of ``parameters``; a number for one that the module has not."""
    return [names.get(id(parameter), number) for number, parameter in enumerate(parameters)]
