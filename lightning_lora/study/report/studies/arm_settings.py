"""In what arms differ that a chart can have as its axis: rank, and rows per optimizer step."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from lightning_lora.study.matched.record import ArmRecord

_LORA = ("model", "init_args", "lora")
_OWN = "arm"
"""Key of the settings of an arm of `Study`."""


def rank_of(arm: ArmRecord) -> int | None:
    """The rank of an arm; None for full fine-tuning, and where only its module knows."""
    for name, value in arm.overrides.items():
        if name.endswith("lora.rank") and isinstance(value, int):
            return value
    rank = _option(arm.config, *_LORA, "rank")
    if isinstance(rank, int):
        return rank
    # An arm of `Study` keeps the text of its LoRAConfig.
    found = re.search(r"\brank=(\d+)", str(_option(arm.config, _OWN, "lora")))
    return int(found.group(1)) if found else None


def rows_of(arm: ArmRecord) -> int | None:
    """Rows per optimizer step; None where the config does not tell."""
    trainer = _option(arm.config, "trainer")
    own = _option(arm.config, _OWN, "trainer")
    given = {**(trainer if isinstance(trainer, Mapping) else {}), **(own if isinstance(own, Mapping) else {})}
    size = _option(arm.config, "data", "init_args", "batch_size") or _option(arm.config, _OWN, "data", "batch_size")
    size = next((value for name, value in arm.overrides.items() if name.endswith(".batch_size")), size)
    steps = next((value for name, value in arm.overrides.items() if name.endswith(_ACCUMULATE)), None)
    steps = steps or given.get(_ACCUMULATE) or 1
    return size * steps if isinstance(size, int) and isinstance(steps, int) else None


def besides(arm: ArmRecord, what: Literal["rank", "batch"]) -> str:
    """All settings of an arm but some: arms with the same text differ in those only."""
    found = repr(_without(arm.config or arm.overrides, _NAMES[what]))
    return re.sub(r"\brank=\d+", "", found) if what == "rank" else found


_ACCUMULATE = "accumulate_grad_batches"
_NAMES = {"rank": ("rank",), "batch": ("batch_size", _ACCUMULATE)}


def _option(config: Any, *names: str) -> Any:
    for name in names:
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _without(value: Any, names: Collection[str]) -> Any:
    """Settings without some, in an order that is the same for all arms, and without what is empty then."""
    if isinstance(value, Mapping):
        kept = (
            (str(key), _without(each, names)) for key, each in value.items() if str(key).split(".")[-1] not in names
        )
        return sorted((key, each) for key, each in kept if each not in ([], None))
    return [_without(each, names) for each in value] if isinstance(value, (list, tuple)) else value
