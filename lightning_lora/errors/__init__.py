"""Every error that a user can cause. A message says what was wrong, where, and what to do, then its code and page.

Each class also inherits from a built-in error, so that ``except ValueError`` keeps working, and from one of a few broad
ones, such as `ConfigError`. The docstring of a class says what happened and what to do, as
``docs/reference/errors.md`` shows it.

Read in this order: `base`, `settings`, `files`, `data`, `training`, `rewards`, `analysis`, `words` (parts of messages),
`arguments` (their types).
"""

from lightning_lora.errors.analysis import (
    BenchmarkError,
    CommandError,
    GenerateError,
    PlanError,
    ProbeError,
    StatisticsError,
    StudySettingError,
    VersionError,
    with_code,
)
from lightning_lora.errors.arguments import check_arguments, no_effect
from lightning_lora.errors.base import (
    LoRAError,
)
from lightning_lora.errors.data import (
    ChatTemplateError,
    DataError,
    DataFileError,
    DataSettingError,
    ResultFileError,
    TokenizerError,
)
from lightning_lora.errors.files import (
    AdapterFileError,
    AdapterFolderError,
    BaseMismatchError,
    CheckpointFileError,
    DamagedFileError,
    OutputPlaceError,
    RunSourceError,
)
from lightning_lora.errors.rewards import (
    PolicySettingError,
    RewardError,
    RewardSettingError,
    SamplerError,
    SamplingSettingError,
)
from lightning_lora.errors.settings import (
    AdapterStateError,
    ConfigError,
    LayerError,
    LoRASettingError,
    RankChangeError,
    TargetNotFoundError,
)
from lightning_lora.errors.training import (
    AccumulationError,
    AlreadyShardedError,
    CallbackSettingError,
    GradientError,
    GuardError,
    MeasurementError,
    OptimizerSettingError,
    QuantisationError,
    RunFolderError,
    StrategyError,
    TaskSettingError,
)
from lightning_lora.errors.words import (
    check_choice,
    check_count,
    did_you_mean,
    first_five,
    first_line,
    kind_and_line,
    user_error,
)

__all__ = [
    "AccumulationError",
    "AdapterFileError",
    "AdapterFolderError",
    "AdapterStateError",
    "AlreadyShardedError",
    "BaseMismatchError",
    "BenchmarkError",
    "CallbackSettingError",
    "ChatTemplateError",
    "CheckpointFileError",
    "CommandError",
    "ConfigError",
    "DamagedFileError",
    "DataError",
    "DataFileError",
    "DataSettingError",
    "GenerateError",
    "GradientError",
    "GuardError",
    "LayerError",
    "LoRAError",
    "LoRASettingError",
    "MeasurementError",
    "OptimizerSettingError",
    "OutputPlaceError",
    "PlanError",
    "PolicySettingError",
    "ProbeError",
    "QuantisationError",
    "RankChangeError",
    "ResultFileError",
    "RewardError",
    "RewardSettingError",
    "RunFolderError",
    "RunSourceError",
    "SamplerError",
    "SamplingSettingError",
    "StatisticsError",
    "StrategyError",
    "StudySettingError",
    "TargetNotFoundError",
    "TaskSettingError",
    "TokenizerError",
    "VersionError",
    "check_arguments",
    "check_choice",
    "check_count",
    "did_you_mean",
    "first_five",
    "first_line",
    "kind_and_line",
    "no_effect",
    "user_error",
    "with_code",
]
