"""LightningCLI's argument parser with short errors: what was wrong, where, and which known name is near."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_lora.allowed_imports import allowed, look_in_working_folder
from lightning_lora.cli.missing_package import missing_package_advice
from lightning_lora.cli.mistakes.class_paths import wrong_class_path
from lightning_lora.cli.mistakes.config_files import place_of
from lightning_lora.cli.mistakes.options import arguments_at, full_names, nearest
from lightning_lora.cli.mistakes.printed import check_printed
from lightning_lora.cli.mistakes.renamed import in_config, in_words
from lightning_lora.cli.mistakes.values import last_class, wrong_value
from lightning_lora.errors import ConfigError, did_you_mean, with_code

ALLOWED_PREFIXES = ("lightning_lora", "lightning", "torch", "torchmetrics", "transformers", "tokenizers")
"""What class paths of a config may begin with, beside what the user allows."""
_NOT_ALLOWED = r"Importing '.*?' is not allowed"
_NO_SUBCLASS = r"Import path does not correspond to a subclass of \w+"
_UNKNOWN_IN_CLASS = r"(?:Option|Group|Key) ['\"](.*?)['\"] is not (?:accepted|expected)"
_UNKNOWN = (
    r"(?:does not accept option|Option|Group|Key) ['\"](.*?)['\"]|unrecognized arguments: (\S+)|ambiguous option: (\S+)"
)
_ALLOW = "configs may name classes of known packages only. For your own: lightning-lora --allow PREFIX ..."
_NO_MODEL = "there is no model: give --config FILE that names one, as cli_configs/sft.yaml does, or --model CLASS_PATH."


class LoRAArgumentParser(LightningArgumentParser):
    """A parser that exits with code 2 and one line, which names the known options nearest to an unknown one.

    Attributes:
        given: The command line, in which the place of a wrong setting is looked up.
    """

    given: Sequence[str] = ()

    @override
    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Parse a command line; old names of options are accepted for two releases."""
        return super().parse_args(in_words(sys.argv[1:] if args is None else args), *rest, **options)

    @override
    def _load_config_parser_mode(self, content: str, *rest: Any, **options: Any) -> Any:
        return super()._load_config_parser_mode(in_config(content), *rest, **options)

    @override
    def dump(self, cfg: Any, *rest: Any, **options: Any) -> str:
        """The settings as text; what a class would refuse of them is refused here too."""
        try:
            check_printed(cfg)
        except ConfigError as error:
            self.refuse(str(error))
        return super().dump(cfg, *rest, **options)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        self.refuse(self._shorten(message))

    def refuse(self, sentence: str) -> NoReturn:
        """Print a sentence as an error and exit with code 2."""
        print(f"error: {with_code(sentence)}", file=sys.stderr)
        print(f"tip: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def _shorten(self, message: str) -> str:
        if missing := missing_package_advice(message):
            return missing
        outer = re.search(r"Parser key \"(.*?)\"", message)
        where = f"{outer.group(1)}: " if outer else ""
        if found := re.search(_NOT_ALLOWED, message):
            return f"{where}{found.group(0)}: {_ALLOW}"
        if sentence := wrong_class_path(message):
            return where + sentence
        if (found := re.search(_UNKNOWN_IN_CLASS, message)) and (kind := last_class(message)):
            place = self._place(f"{outer.group(1)}.init_args.{found.group(1)}") if outer else ""
            return f"{where}{found.group(0)}{place}{did_you_mean(found.group(1), arguments_at(kind))}"
        if found := re.search(_UNKNOWN, message):
            return self._unknown(next(filter(None, found.groups())))
        if found := re.search(_NO_SUBCLASS, message):
            return where + found.group(0)
        if wrong := wrong_value(message):
            return f"{wrong[0]}{self._place(wrong[0])} {wrong[1]}"
        if re.search(r"required: (\w+\.)?model$", message):
            return _NO_MODEL
        return " ".join(message.split())

    def _unknown(self, name: str) -> str:
        key = name.lstrip("-").partition("=")[0]
        if not name.startswith("-") and name in self.given:
            return f"{name!r} is no option: options begin with --{nearest(key, self._options())}"
        return f"there is no option {key!r}{self._place(key)}{nearest(key, self._options())}"

    def _options(self) -> set[str]:
        parsers = [self, *getattr(self._subcommands_action, "choices", {}).values()]
        return full_names(action.dest for parser in parsers for action in parser._actions)

    def _place(self, key: str) -> str:
        place = place_of(key, self.given)
        return f" ({place})" if place else ""


def restrict_imports() -> None:
    """Let configs name only classes of packages the user trusts, and read configs only from this machine."""
    if allowed():
        look_in_working_folder()
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*ALLOWED_PREFIXES, *allowed()],
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,
        add_print_completion_argument=True,
    )
