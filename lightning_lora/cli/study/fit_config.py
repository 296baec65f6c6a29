"""What ``fit`` reads from its arguments, without anything being trained."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import override

from lightning_lora.cli.lora_cli import LoRACLI, run_trainer_command
from lightning_lora.errors import StudySettingError


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
        raise StudySettingError(f"{where}: {sentence.replace(' (on the command line)', '')}") from exit
    finally:
        sys.argv[1:] = before


def fit_objects(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Module and data module of a config, without weights and rows."""
    before = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
        try:
            cli = run_trainer_command(["plan", f"--config={file}"], ())
        finally:
            sys.argv[1:] = before
    return cli.model, cli.datamodule
