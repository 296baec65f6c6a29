"""Settings of adapters and their targets."""

from __future__ import annotations

from lightning_lora.errors.base import LoRAError


class ConfigError(LoRAError, ValueError):
    """A setting is outside its range, has the wrong type, or contradicts another one.

    Give one of the values that the message names.
    """

    code = "LL100"
    page = "use/targets.md"


class LoRASettingError(ConfigError):
    """A setting of `LoRAConfig` cannot be used.

    Correct the setting that the message names; `LoRAConfig()` alone is a good start.
    """

    code = "LL101"
    page = "use/hyperparameters.md"


class AdapterStateError(ConfigError):
    """The adapters are not in the state that the call needs: merged, absent, or made with other settings.

    Call `unmerge_lora`, `remove_lora` or `inject_lora` first, or give the settings that the adapters have.
    """

    code = "LL102"
    page = "reference/files.md#merging"


class LayerError(ConfigError):
    """A layer was asked for that cannot be adapted, or not in this way.

    Take it out by `exclude`, or change what the message names.
    """

    code = "LL103"
    page = "use/targets.md#which-layers-are-adapted-which-are-refused"


class RankChangeError(ConfigError):
    """Ranks cannot be grown, shared out or started along a gradient as asked.

    Change the setting that the message names, or train with fixed ranks.
    """

    code = "LL104"
    page = "use/rank_growth.md"


class TargetNotFoundError(LoRAError, ValueError):
    """A name pattern matches no module, or only modules that cannot be adapted.

    Write one of the names that the message suggests; `print(module)` shows all of them.
    """

    code = "LL201"
    page = "use/targets.md#patterns"
