"""A run and what watches it."""

from __future__ import annotations

from lightning_lora.errors.base import LoRAError
from lightning_lora.errors.settings import ConfigError


class GuardError(LoRAError, RuntimeError):
    """A run trains nothing, trains the wrong parameters, or has changed frozen ones.

    Look at the layers or parameters that the message names: they get no gradient, or bypass the adapter.
    """

    code = "LL500"
    page = "evidence/lightning.md#callbacks"


class AccumulationError(ConfigError):
    """Gradients cannot be accumulated as asked.

    Keep one of the two settings that the message names.
    """

    code = "LL501"
    page = "use/accumulation.md#what-is-refused"


class MeasurementError(ConfigError):
    """A noise scale or a capacity cannot be measured on this module or with these settings.

    Change what the message names, or run without the monitor: training does not need it.
    """

    code = "LL502"
    page = "understand/batch_size.md#the-monitor"


class CallbackSettingError(ConfigError):
    """A callback has a setting that it cannot use, or cannot serve this run.

    Correct the setting, or leave the callback out.
    """

    code = "LL503"
    page = "evidence/lightning.md#callbacks"


class OptimizerSettingError(ConfigError):
    """The optimizer, its rates or the precision do not fit adapters.

    Build the optimizer in `configure_optimizers` from `lora_parameter_groups`.
    """

    code = "LL504"
    page = "evidence/lightning.md#learning-rates"


class StrategyError(ConfigError):
    """A strategy, or sharding by hand, cannot be used with these adapters.

    Choose a strategy from the table of the page.
    """

    code = "LL505"
    page = "use/strategies.md"


class QuantisationError(ConfigError):
    """A quantised base cannot be loaded or trained as asked.

    Change the setting that the message names, or train the base unquantised.
    """

    code = "LL506"
    page = "use/quantisation.md"


class TaskSettingError(ConfigError):
    """A setting of a model of this package cannot be used, or its model cannot be loaded.

    Correct the setting, or give `model` a folder with weights in safetensors.
    """

    code = "LL507"
    page = "start/first_hour.md"


class GradientError(LoRAError, RuntimeError):
    """A gradient is NaN or infinite.

    Look at the batches that the message names, clip gradients, or lower the learning rate.
    """

    code = "LL510"
    page = "use/faults.md"


class RunFolderError(LoRAError, ValueError):
    """The folder of a run cannot be written, or another run is writing there.

    Choose another folder, or stop the other run.
    """

    code = "LL511"
    page = "use/faults.md"


class AlreadyShardedError(LoRAError, RuntimeError):
    """An operation needs full parameters, but a strategy has wrapped or sharded them already.

    Do it before the strategy shards, in `configure_model`.
    """

    code = "LL512"
    page = "use/strategies.md"
