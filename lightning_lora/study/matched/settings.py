"""Single settings of a study file, each read or refused with one message."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_lora.errors import StudySettingError, did_you_mean

LOG_FACTOR = 1.1
"""How many times the step before an evaluation may be at most, with ``evaluations: log``."""


def check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse a setting that is none of those known."""
    for key in given:
        if key not in known:
            raise StudySettingError(f"{where} has no setting {key!r}{did_you_mean(str(key), known)}")


def mapping(given: Any, where: str) -> Mapping[str, Any]:
    """A mapping of names to settings."""
    if not isinstance(given, Mapping):
        raise StudySettingError(f"{where} must map names to settings, got {given!r}.")
    return given


def texts(given: Any, where: str) -> tuple[str, ...]:
    """One text, or a list of them, such as files."""
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise StudySettingError(f"{where} must be a list of files, got {given!r}.")
    return tuple(given)


def overrides(given: Any, where: str) -> dict[str, Any]:
    """Dotted options to values; nested mappings are left as they are, since an option may take one."""
    return {str(name): value for name, value in mapping(given or {}, where).items()}


def rates(given: Any, where: str) -> tuple[float, ...]:
    """Learning rates, ascending; none for ``auto``."""
    if given == "auto":
        return ()
    given = given if isinstance(given, list) else [given]
    rates = tuple(number(rate, where) for rate in given)
    if not rates:
        raise StudySettingError(f"{where} is empty: give learning rates, in terms of full fine-tuning, or auto.")
    if not all(0 < rate < math.inf for rate in rates):
        raise StudySettingError(f"{where} must be positive numbers, got {given}.")
    return tuple(sorted(set(rates)))


def study_name(given: Any) -> str:
    """The name of a study, which is that of its folder, too."""
    if not isinstance(given, (str, int)) or re.search(r"^\s*$|^[.~]|[/\\\0]", str(given)):
        raise StudySettingError(
            f"name must be a text that can name a folder, without '/' or '.' in front, got {given!r}."
        )
    return str(given)


def number(given: Any, where: str) -> float:
    """A number."""
    try:
        if isinstance(given, bool):
            raise ValueError
        return float(given)  # YAML reads 1e-4 as a text
    except (TypeError, ValueError):
        raise StudySettingError(f"{where} must be a number, got {given!r}.") from None


def flag(given: Mapping[str, Any], key: str) -> bool:
    """A setting that is true or false; false if it is not there."""
    if not isinstance(value := given.get(key, False), bool):
        raise StudySettingError(f"{key} must be true or false, got {value!r}.")
    return value


def evaluation_factor(given: Any) -> float | None:
    """How many times the step before each evaluation may be at most; None where nothing is said."""
    if given in (None, "log"):
        return None if given is None else LOG_FACTOR
    factor = number(given, "evaluations (log, or a factor such as 1.3)")
    if not 1 < factor < math.inf:
        raise StudySettingError(
            f"evaluations must be log, or above 1: how many times the step before an evaluation may be at most; got "
            f"{given!r}."
        )
    return factor


def four_arms(given: Any) -> dict[str, dict[str, str]]:
    """Adapters and full fine-tuning, each at a small and a large batch; empty where nothing is said."""
    shape = "batch_penalty names four arms: {lora: {small: ARM, large: ARM}, full: {small: ARM, large: ARM}}"
    if given is None:
        return {}
    kinds, batches = ("lora", "full"), ("small", "large")
    if not isinstance(given, Mapping) or {*given} != {*kinds}:
        raise StudySettingError(f"{shape}, got {given!r}.")
    if any(not isinstance(given[kind], Mapping) or {*given[kind]} != {*batches} for kind in kinds):
        raise StudySettingError(f"{shape}, got {given!r}.")
    return {kind: {batch: str(given[kind][batch]) for batch in batches} for kind in kinds}


def seeds(given: Any) -> int | tuple[int, ...] | Literal["auto"]:
    """A number of seeds, a list of them, or ``auto``."""
    if isinstance(given, list):
        return seed_list(given, "seeds")
    return given  # `SeedPlan` refuses what is neither a number nor auto


def seed_list(given: Any, where: str) -> tuple[int, ...]:
    """A list of different seeds."""
    given = given if isinstance(given, list) else [given]
    if not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in given):
        raise StudySettingError(f"{where} must be whole numbers of 0 or more, got {given}.")
    if not given or len(set(given)) < len(given):
        what = f"has a seed twice: {given}" if given else "is empty: name at least one seed, or leave it out"
        raise StudySettingError(f"{where} {what}.")
    return tuple(given)
