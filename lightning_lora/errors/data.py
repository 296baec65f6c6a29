"""Data, templates, tokenizers and results."""

from __future__ import annotations

from lightning_lora.errors.base import LoRAError
from lightning_lora.errors.settings import ConfigError


class DataError(LoRAError, ValueError):
    """A data file or one of its rows cannot be used.

    Correct the file at the place that the message names.
    """

    code = "LL400"
    page = "use/data.md"


class ChatTemplateError(ConfigError):
    """A chat template, or a variable of it, cannot be used.

    Give another template by `chat_template`, or correct the line that the message names.
    """

    code = "LL401"
    page = "use/chat_templates.md#settings"


class TokenizerError(ConfigError):
    """There is no tokenizer, or it lacks what training needs.

    Give `tokenizer` a folder or a hub name with one, or a token that it lacks.
    """

    code = "LL402"
    page = "use/data.md"


class DataSettingError(ConfigError):
    """A setting of a data module cannot be used.

    Give one of the values that the message names.
    """

    code = "LL403"
    page = "use/data.md"


class DataFileError(DataError):
    """A data file is missing, damaged, empty or of an unknown kind.

    Give a file of a known kind, and mind the folder from which names are looked up.
    """

    code = "LL404"
    page = "use/data.md#kinds-of-files"


class ResultFileError(DataError):
    """Results of a run, probe or study are missing, damaged, or too few to say anything.

    Name the folder that the run has written, or run it again.
    """

    code = "LL405"
    page = "use/report.md"
