"""What the arms of a study must have in common, so that they differ only in what they are compared for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lora.errors import StudySettingError
from lightning_lora.study.matched.options import option_of
from lightning_lora.study.matched.spec import ArmSpec

# How rows are put into batches is a setting like others; which rows there are is not.
_OF_BATCHES = ("batch_size", "num_workers", "num_proc", "packing", "pin_memory")
_EQUAL = {
    "data class": "data.class_path",
    "model class": "model.class_path",
    "base model": "model.init_args.model",
    "precision of the base": "model.init_args.dtype",
    "precision": "trainer.precision",
    "number of epochs": "trainer.max_epochs",
    "time limit": "trainer.max_time",
    "share of the validation rows": "trainer.limit_val_batches",
    "order of the rows": "trainer.overfit_batches",  # turns shuffling off
    "plugins": "trainer.plugins",
    "accelerator": "trainer.accelerator",
    "strategy": "trainer.strategy",
}

_TRAINS_NOTHING = ("trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches")
"""Options at whose 0 a run ends before its first step."""


def check_equal(arms: Sequence[ArmSpec]) -> None:
    """Raise `ConfigError` if arms differ in data, evaluation rows, precision or budget, or a run needs many devices."""
    first = arms[0]
    for arm in arms:
        _check_one_device(arm)
        for option in _TRAINS_NOTHING:
            value = option_of(arm.config, option)
            if value == 0 and not isinstance(value, bool):
                raise StudySettingError(f"arm {arm.name!r}: {option} is {value}, and nothing would be trained.")
    for arm in arms[1:]:
        for what, option in _EQUAL.items():
            _compare(what, option, first, arm)
        settings = [option_of(each.config, "data.init_args") or {} for each in (first, arm)]
        for name in dict.fromkeys(key for each in settings for key in each if key not in _OF_BATCHES):
            _compare("data", f"data.init_args.{name}", first, arm)
        for option, rows_of in _BUDGETS.items():
            rows = [rows_of(each.config) for each in (first, arm)]
            if rows[0] != rows[1]:
                raise StudySettingError(
                    f"arms {first.name!r} and {arm.name!r} train on {rows[0]} and {rows[1]} rows by {option} and batch "
                    f"size: a comparison needs the same number; change trainer.{option} with the batch."
                )
    for place, arm in enumerate(arms):
        for other in arms[:place]:
            if other.config == arm.config:
                raise StudySettingError(
                    f"arms {other.name!r} and {arm.name!r} are the same: give each arm overrides or configs of its own."
                )


def _compare(what: str, option: str, one: ArmSpec, other: ArmSpec) -> None:
    values = option_of(one.config, option), option_of(other.config, option)
    if values[0] != values[1]:
        raise StudySettingError(
            f"arms {one.name!r} and {other.name!r} differ in {what} ({option}: {values[0]!r} and {values[1]!r}), which "
            f"must be equal in all arms: set it for the whole study."
        )


def _rows_by_steps(config: Mapping[str, Any]) -> str:
    """Training rows by the number of steps, in words."""
    steps = option_of(config, "trainer.max_steps", -1)
    return "all" if steps is None or steps < 0 else f"{steps * rows_of_step(config):,}"


def _rows_by_batches(config: Mapping[str, Any]) -> str:
    """Training rows of an epoch by a number or share of batches, in words."""
    limit = option_of(config, "trainer.limit_train_batches")
    if limit is None or (isinstance(limit, float) and limit <= 1):
        return "all" if limit in (None, 1.0) else f"{limit:.4%} of the"
    # Python 3.10 takes float | int for int | float, by which of both it has seen first: 2 may be 2.0 here.
    return f"{int(limit) * (option_of(config, 'data.init_args.batch_size') or 1):,}"


_BUDGETS = {"max_steps": _rows_by_steps, "limit_train_batches": _rows_by_batches}


def rows_of_step(config: Mapping[str, Any]) -> int:
    """Rows of an optimizer step."""
    return option_of(config, "target_batch_size") or (
        (option_of(config, "data.init_args.batch_size") or 1)
        * (option_of(config, "trainer.accumulate_grad_batches") or 1)
    )


def _check_one_device(arm: ArmSpec) -> None:
    devices, strategy = option_of(arm.config, "trainer.devices", 1), option_of(arm.config, "trainer.strategy", "auto")
    why = "and each run of a study trains on one device: take it out"
    # The command line gives texts: "2", or "0,1" for two of them.
    named = devices if isinstance(devices, list) else str(devices).split(",")
    if len(named) > 1 or (not isinstance(devices, list) and named[0] not in ("1", "auto", "None")):
        raise StudySettingError(
            f"arm {arm.name!r}: trainer.devices is {devices}, {why}, and start one worker on each device."
        )
    if str(nodes := option_of(arm.config, "trainer.num_nodes", 1)) not in ("1", "None"):
        raise StudySettingError(f"arm {arm.name!r}: trainer.num_nodes is {nodes}, {why}.")
    if not isinstance(strategy, str) or strategy not in ("auto", "single_device"):
        raise StudySettingError(f"arm {arm.name!r}: trainer.strategy is {strategy!r}, {why}.")
