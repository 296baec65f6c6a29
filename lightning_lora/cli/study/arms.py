"""The config of each arm as ``fit`` would read it: config files, overrides, and what must be equal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_lora.cli.study.fit_config import fit_config, fit_objects
from lightning_lora.cli.study.matched_size import LORA, rank_like
from lightning_lora.errors import LoRAError, StudySettingError
from lightning_lora.study.matched.checks.built import BuiltArm, build_arm, check_kept
from lightning_lora.study.matched.checks.equal import check_equal
from lightning_lora.study.matched.options import has_option, option_of
from lightning_lora.study.matched.spec import ArmSpec, StudySpec
from lightning_lora.study.statistics.rates.sweep import first_rates
from lightning_lora.study.tasks.settings import KEEP_VARIABLE

_OF_THE_STUDY = ("seed_everything", "ckpt_path", "trainer.default_root_dir", "trainer.logger", "data.init_args.seed")


def resolve(
    spec: StudySpec, configs: Sequence[str], overrides: Mapping[str, Any], beside: Path, more: Sequence[str] = ()
) -> StudySpec:
    """The study with the config of each arm, and the rates that each sweep starts with.

    Args:
        spec: The study as its file says.
        configs: Config files of all arms.
        overrides: Options of all arms.
        beside: The folder of the study file, where config files are looked for that are not in the working folder.
        more: Further arguments of ``fit`` for all arms.

    Raises:
        ConfigError: If a config or an option is wrong, or the arms differ in what must be equal.
    """
    if not more and not configs and not any(arm.configs for arm in spec.arms):
        raise StudySettingError("there are no configs: name the config files of fit under configs, as in fit --config.")

    def made(arm: ArmSpec) -> ArmSpec:
        both = {**overrides, **arm.overrides}
        _check_overrides(arm.name, both, spec.learning_rate_option)
        files = [_found(name, beside) for name in (*configs, *arm.configs)]
        arguments = [*(f"--config={file}" for file in files), *more, *(_argument(*pair) for pair in both.items())]
        return replace(arm, config=fit_config(arguments, f"arm {arm.name!r}"))

    arms = {arm.name: made(arm) for arm in spec.arms}
    for arm in list(arms.values()):
        if arm.matched_rank:
            try:
                rank = rank_like(arm, arms[arm.matched_rank])
            except LoRAError as error:
                raise StudySettingError(f"arm {arm.name!r}, matched_rank {arm.matched_rank!r}: {error}") from error
            arms[arm.name] = made(replace(arm, overrides={**arm.overrides, f"{LORA}.rank": rank}))
    found = [_with_rates(arm, spec) for arm in arms.values()]
    check_equal(found)
    reasons = ["" if (built := _built(arm)) is None else built.why_no_rows for arm in found]
    is_cpu = option_of(found[0].config, "trainer.accelerator") == "cpu" or not torch.cuda.is_available()
    tokens = max((_tokens(arm.config) for arm in found), default=0) or None
    return replace(spec, arms=tuple(found)).with_mode(reasons, tokens, is_cpu)


def _tokens(config: Mapping[str, Any]) -> int:
    """Most tokens of a batch; 0 if they are not known."""
    return (option_of(config, "data.init_args.batch_size") or 0) * (option_of(config, "data.init_args.max_length") or 0)


def _built(arm: ArmSpec) -> BuiltArm | None:
    """Make module and data module of an arm, which refuse what the parser does not know, and adapt the module."""
    built = build_arm(arm.name, lambda: fit_objects(arm.config)[0], option_of(arm.config, "trainer.callbacks"))
    if os.environ.get(KEEP_VARIABLE):
        check_kept(arm.name, built)
    return built


def _check_overrides(arm: str, overrides: Mapping[str, Any], rate_option: str) -> None:
    if rate_option in overrides:
        raise StudySettingError(
            f"arm {arm!r} overrides {rate_option}, which the study sets for each run: give learning_rates."
        )
    for option in overrides:
        if option in _OF_THE_STUDY:
            raise StudySettingError(
                f"arm {arm!r} overrides {option}, which the study sets for each run, alike in all arms."
            )


def _found(name: str, beside: Path) -> str:
    file = beside / name
    return str(file) if not Path(name).exists() and file.exists() else name


def _argument(option: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"--{re.sub('^--', '', option)}={text}"


def _with_rates(arm: ArmSpec, spec: StudySpec) -> ArmSpec:
    option = spec.learning_rate_option
    if not has_option(arm.config, option):
        raise StudySettingError(
            f"arm {arm.name!r} has no option {option}: name the one that takes the learning rate as "
            f"learning_rate_option, such as model.init_args.lr."
        )
    if arm.learning_rates:
        return arm
    rate = option_of(arm.config, option)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
        raise StudySettingError(
            f"arm {arm.name!r}: {option} is {rate!r}, so no sweep can start from it: give learning_rates."
        )
    return replace(arm, learning_rates=first_rates(rate))
