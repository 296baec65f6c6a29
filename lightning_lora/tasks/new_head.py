"""What tasks with a new output layer have in common: its size, its training in full, and padding."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from typing_extensions import override

from lightning_lora.lora.config import LoRAConfig
from lightning_lora.tasks.loading import head_names
from lightning_lora.tasks.pretrained import PretrainedTask


class NewHeadTask(PretrainedTask):
    """A pretrained body with a new output layer for whole sequences, which is trained in full.

    A subclass sets ``_num_outputs``, the size of that layer, before it calls this constructor.

    Args:
        model: Folder of a model on this machine, or its hub name.
        settings: The settings of `PretrainedTask`.
    """

    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    new_head: ClassVar[bool] = True
    _num_outputs: int

    def __init__(self, model: str, **settings: Any) -> None:
        super().__init__(model, **settings)
        if self.model_config.pad_token_id is None:
            # The head reads the last token that is not padding.
            pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
            self.model_config.pad_token_id = end if pad is None else pad

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute the outputs, ``(rows, outputs)``."""
        assert self.model is not None
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    @override
    def _config_overrides(self) -> dict[str, Any]:
        return {"num_labels": self._num_outputs}

    @override
    def _trainable_patterns(self, meta_model: nn.Module, config: LoRAConfig) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*config.trainable, *head_names(meta_model)]))
