"""LightningCLI's argument parser with short errors: what was wrong, where, and which known name is near."""

from __future__ import annotations

import re
import sys
from typing import NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_lora.cli.missing_package import missing_package_advice
from lightning_lora.data import SFTDataModule
from lightning_lora.errors import did_you_mean
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.tasks import CausalLM, SequenceClassifier

_OURS = (CausalLM, SequenceClassifier, SFTDataModule, LoRAConfig)
# The parser tries every member of a union and reports all failures; one of these patterns finds what the user did.
_CAUSES = (
    r"Importing '.*?' is not allowed",
    r"(?:Option|Group|Key|Subcommand) ['\"].*? (?:is not accepted|does not accept option .*|is not expected)",
    r"Import path does not correspond to a subclass of \w+",
    r"Expected a dot import path string: .*",
    r"unrecognized arguments: .*",
)


class LoRAArgumentParser(LightningArgumentParser):
    """A parser that exits with code 2 and one message, which names the known options nearest to an unknown one."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"error: {self._shorten(message)}", file=sys.stderr)
        print(f"tip: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def _shorten(self, message: str) -> str:
        if missing := missing_package_advice(message):
            return missing
        for pattern in _CAUSES:
            found = re.search(pattern, message)
            if found:
                key = re.search(r"Parser key \"(.*?)\"", message)
                where = f"{key.group(1)}: " if key else ""
                return f"{where}{found.group(0)}{self._nearest(found.group(0))}{_advice(found.group(0))}"
        return message

    def _nearest(self, cause: str) -> str:
        """The end of a sentence with the options nearest to the last name in ``cause``."""
        names = re.findall(r"[\w.]*\w", cause.partition(": ")[2] or "".join(re.findall(r"['\"](.*?)['\"]", cause)[-1:]))
        parsers = [self, *getattr(self._subcommands_action, "choices", {}).values()]
        options = {action.dest for parser in parsers for action in parser._actions}
        # Not inspect.signature: a task passes options on to its base class as **settings.
        options |= {name for kind in _OURS for name in ArgumentParser().add_class_arguments(kind)}
        return did_you_mean(names[0], sorted(options)) if names else ""


def _advice(cause: str) -> str:
    if cause.startswith("Importing"):
        return ": configs may name classes of known packages only. For your own: lightning-lora --allow PREFIX ..."
    return ""
