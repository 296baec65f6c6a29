"""A causal language model that is compared with a reference, token by token."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lora.errors import PolicySettingError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.tasks.causal_lm import CausalLM
from lightning_lora.tasks.rl.reference import Reference


class Policy(CausalLM):
    """A causal language model without dropout, which would make it another one at each pass, and its reference.

    Args:
        model: Folder of a model on this machine, or its hub name.
        learning_rate: See `PretrainedTask`.
        lora: See `PretrainedTask`.
        reference: See `Reference`.
        settings: The other settings of `PretrainedTask`.

    Raises:
        ConfigError: If a setting is refused, or the model cannot be found.
    """

    def __init__(
        self,
        model: str,
        learning_rate: float,
        lora: LoRAConfig | dict[str, Any] | None = None,
        reference: str | None = None,
        **settings: Any,
    ) -> None:
        if lora is not None and LoRAConfig.from_dict(lora).dropout:
            raise PolicySettingError(
                "dropout of adapters makes a policy another one at each pass: set lora.dropout to 0."
            )
        super().__init__(model, learning_rate, lora, **settings)
        self.reference = Reference(reference, lora is not None)
        if off := turn_off_dropout(self.model_config):
            rank_zero_info(f"dropout is off in {type(self).__name__}: {', '.join(off)}")

    @property
    def has_reference(self) -> bool:
        """Whether anything is computed from the reference."""
        return True

    @override
    def on_train_start(self) -> None:
        """Take the model as it is now as the reference, unless the run goes on."""
        super().on_train_start()
        if self.has_reference:
            self._fix_reference()
            rank_zero_info(f"reference: {self.reference.kind}")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the reference, which the trained weights do not tell."""
        super().on_save_checkpoint(checkpoint)
        self.reference.save(checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the reference of the checkpoint's run."""
        super().on_load_checkpoint(checkpoint)
        self.reference.load(checkpoint)

    def _fix_reference(self) -> None:
        assert self.model is not None
        self.reference.fix(self.model)


def turn_off_dropout(config: Any) -> list[str]:
    """Set every dropout probability of a transformers config to 0, in place; returns the names of those that were not.

    Args:
        config: The config, before a model is built from it. Configs inside it are changed too.
    """
    names = []
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            names += [f"{name}.{inner}" for inner in turn_off_dropout(value)]
        elif ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float) and value:
            setattr(config, name, 0.0)
            names.append(name)
    return names
