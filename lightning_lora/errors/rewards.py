"""Rewards, samplers and policies."""

from __future__ import annotations

from lightning_lora.errors.base import LoRAError
from lightning_lora.errors.settings import ConfigError


class RewardError(LoRAError, RuntimeError):
    """A reward fails on a row: it raises, takes too long, or returns no finite number.

    Correct the function for the prompt and completion that the message shows.
    """

    code = "LL600"
    page = "use/rewards.md#what-can-go-wrong"


class RewardSettingError(ConfigError):
    """A reward cannot be used as it is given.

    Correct the name or the setting that the message names.
    """

    code = "LL601"
    page = "use/rewards.md"


class SamplerError(LoRAError, RuntimeError):
    """A server that draws completions cannot be asked, or gives no usable answer.

    Start the server as the page shows, and give its address.
    """

    code = "LL602"
    page = "use/rewards.md#a-server-that-writes-the-answers"


class SamplingSettingError(ConfigError):
    """Completions cannot be drawn with these settings or from this model.

    Correct the setting that the message names.
    """

    code = "LL603"
    page = "use/reinforcement.md"


class PolicySettingError(ConfigError):
    """A setting of a policy, of its loss or of a preference module cannot be used.

    Give one of the values that the message names.
    """

    code = "LL604"
    page = "use/reinforcement.md#when-something-is-wrong"
