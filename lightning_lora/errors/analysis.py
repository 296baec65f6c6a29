"""Plans, studies, probes and commands."""

from __future__ import annotations

from lightning_lora.errors.base import CODE, LoRAError
from lightning_lora.errors.settings import ConfigError


class PlanError(ConfigError):
    """A plan cannot be made of this model, data or machine.

    Correct what the message names; a plan takes the settings of `fit`.
    """

    code = "LL700"
    page = "understand/plan.md"


class StudySettingError(ConfigError):
    """A study file, an arm or the place of a study cannot be used.

    Correct the setting that the message names.
    """

    code = "LL800"
    page = "understand/study.md#the-study-file"


class StatisticsError(ConfigError):
    """Runs cannot be compared as asked.

    Give the seeds, rates or bands that the message names.
    """

    code = "LL801"
    page = "understand/study_statistics.md"


class ProbeError(ConfigError):
    """A probe cannot be made in this run.

    Change the setting that the message names, or run without the probe.
    """

    code = "LL802"
    page = "understand/batch_probe.md"


class BenchmarkError(ConfigError):
    """Models of a study cannot be measured on tasks as asked.

    Correct the setting that the message names.
    """

    code = "LL803"
    page = "use/task_benchmarks.md"


class CommandError(ConfigError):
    """A command line or a config file has a mistake.

    Correct what the message names; every command explains itself with `--help`.
    """

    code = "LL900"
    page = "start/first_hour.md"


def with_code(sentence: str) -> str:
    """A sentence about a mistake on the command line, with the code of such mistakes if it has none yet."""
    return sentence if CODE.search(sentence) else str(CommandError(sentence))


class GenerateError(ConfigError):
    """Answers cannot be generated from this model or these prompts.

    Correct what the message names.
    """

    code = "LL901"
    page = "use/generate.md"


class VersionError(LoRAError, ImportError):
    """A library is installed in a version that this package does not support.

    Run the command that the message ends with.
    """

    code = "LL910"
    page = "reference/compatibility.md#versions"
