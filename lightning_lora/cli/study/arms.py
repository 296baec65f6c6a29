"""The config of each arm as ``fit`` would read it: config files, overrides, and what must be equal."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import override

from lightning_lora.cli.lora_cli import LoRACLI
from lightning_lora.errors import ConfigError
from lightning_lora.study.matched.equal import check_equal
from lightning_lora.study.matched.options import has_option, option_of
from lightning_lora.study.matched.spec import ArmSpec, StudySpec
from lightning_lora.study.statistics.rates.sweep import first_rates

_OF_THE_STUDY = ("seed_everything", "ckpt_path", "trainer.default_root_dir", "trainer.logger", "data.init_args.seed")


class ConfigCLI(LoRACLI):
    """Reads the arguments of ``fit`` and makes nothing of them.

    Attributes:
        fit_config: All options, as ``config.yaml`` of a run has them.
    """

    @override
    def _set_seed(self) -> None:
        pass

    @override
    def _parse_ckpt_path(self) -> None:
        pass

    @override
    def before_instantiate_classes(self) -> None:
        pass

    @override
    def instantiate_classes(self) -> None:
        pass

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        self._dump_config()
        self.fit_config: dict[str, Any] = self.config_dump


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
    made = []
    for arm in spec.arms:
        both = {**overrides, **arm.overrides}
        _check_overrides(arm.name, both, spec.learning_rate_option)
        files = [_found(name, beside) for name in (*configs, *arm.configs)]
        arguments = [*(f"--config={file}" for file in files), *more, *(_argument(*pair) for pair in both.items())]
        if not files and not more:
            raise ConfigError("there are no configs: name the config files of fit under configs, as in fit --config.")
        made.append(_with_rates(replace(arm, config=fit_config(arguments, f"arm {arm.name!r}")), spec))
    check_equal(made)
    return replace(spec, arms=tuple(made))


def fit_config(arguments: Sequence[str], where: str) -> dict[str, Any]:
    """All options of ``fit`` for these arguments.

    Args:
        arguments: What follows ``fit`` on the command line.
        where: Whose arguments they are, for a message.

    Raises:
        ConfigError: If ``fit`` would refuse them.
    """
    before, said = sys.argv[1:], io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            sys.argv[1:] = ["fit", *arguments]  # LightningCLI warns about arguments from elsewhere
            return ConfigCLI().fit_config
    except SystemExit as exit:
        sentence = said.getvalue().removeprefix("error: ").split("\ntip:")[0].strip()
        raise ConfigError(f"{where}: {sentence.replace(' (on the command line)', '')}") from exit
    finally:
        sys.argv[1:] = before


def _check_overrides(arm: str, overrides: Mapping[str, Any], rate_option: str) -> None:
    if rate_option in overrides:
        raise ConfigError(
            f"arm {arm!r} overrides {rate_option}, which the study sets for each run: give learning_rates."
        )
    for option in overrides:
        if option in _OF_THE_STUDY:
            raise ConfigError(f"arm {arm!r} overrides {option}, which the study sets for each run, alike in all arms.")


def _found(name: str, beside: Path) -> str:
    file = beside / name
    return str(file) if not Path(name).exists() and file.exists() else name


def _argument(option: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"--{re.sub('^--', '', option)}={text}"


def _with_rates(arm: ArmSpec, spec: StudySpec) -> ArmSpec:
    option = spec.learning_rate_option
    if not has_option(arm.config, option):
        raise ConfigError(
            f"arm {arm.name!r} has no option {option}: name the one that takes the learning rate as "
            f"learning_rate_option, such as model.init_args.lr."
        )
    if arm.learning_rates:
        return arm
    rate = option_of(arm.config, option)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
        raise ConfigError(
            f"arm {arm.name!r}: {option} is {rate!r}, so no sweep can start from it: give learning_rates."
        )
    return replace(arm, learning_rates=first_rates(rate))


def fit_objects(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Module and data module of a config, without weights and rows."""
    from lightning_lora.cli.lora_cli import run_trainer_command

    before = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
        try:
            cli = run_trainer_command(["plan", f"--config={file}"], ())
        finally:
            sys.argv[1:] = before
    return cli.model, cli.datamodule
