"""A reward model: a score for answers, learned from pairs of which one is preferred."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.errors import PolicySettingError, check_arguments
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.tasks.head_chunks import at_least_float32
from lightning_lora.tasks.loading import head_names
from lightning_lora.tasks.new_head import NewHeadTask
from lightning_lora.tasks.rl.functional.preference_loss import reward_model_loss
from lightning_lora.tasks.rl.pair_means import add_pairs, log_pairs, weights_of
from lightning_lora.tasks.running_mean import RunningMean


class RewardModel(NewHeadTask):
    """A reward model by Bradley and Terry: one score per answer, the chosen one's above the rejected one's.

    Batches are those of `PreferenceDataModule`: ``input_ids`` and ``attention_mask``, each ``(pairs, 2, tokens)`` with
    the chosen row of a pair first, and perhaps ``margin`` and ``weights``, ``(pairs,)``. The score is read at the last
    real token of a row, wherever padding is. The loss is the mean over the pairs of an optimizer step. The new head is
    trained in full, and is saved with the adapter.

    Logged: ``train_loss``, ``train_accuracy`` and ``train_margin``, and for validation and test ``val_loss``,
    ``val_accuracy`` (share of pairs of which the chosen answer has the higher score; a tie is no win) and
    ``val_margin`` (by how much). Prediction gives loss, margin and both scores of each pair.

    Args:
        model: Folder of a model on this machine, or its hub name.
        learning_rate: The learning rate *of full fine-tuning*; see `PretrainedTask`.
        lora: LoRA settings. None trains the whole model (full fine-tuning).
        margin: Whether the column ``margin`` of a pair says how far its scores should be apart at least.
        centre: Weight of a pull of the scores to a mean of 0, at least 0; 0.01 is usual.
        settings: The other settings of `PretrainedTask`.

    Raises:
        ConfigError: If a setting is refused, or the model cannot be found.
        TargetNotFoundError: If a LoRA pattern matches nothing in this model.
    """

    _num_outputs = 1

    def __init__(
        self,
        model: str,
        learning_rate: float = 1e-5,
        lora: LoRAConfig | dict[str, Any] | None = None,
        margin: bool = True,
        centre: float = 0.0,
        **settings: Any,
    ) -> None:
        check_arguments(RewardModel, locals(), PolicySettingError)
        if not 0 <= centre < math.inf:
            raise PolicySettingError(f"centre must be a finite number of at least 0, got {centre!r}.")
        super().__init__(model, learning_rate=learning_rate, lora=lora, **settings)
        self.uses_margin = margin
        self.centre = centre
        self.mean_margin = RunningMean()

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute the score of each row at its last real token, ``(rows,)``, at least float32."""
        assert self.model is not None
        of_head: list[Tensor] = []
        head = self.model.get_submodule(self._head)
        handle = head.register_forward_hook(lambda *called: of_head.append(called[-1]))
        try:
            returned = super().forward(input_ids, attention_mask)
        finally:
            handle.remove()
        if of_head and of_head[0].dim() == 3:
            # transformers looks for padding tokens instead, and overlooks an end of turn that also pads.
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
            returned = of_head[0][torch.arange(len(last), device=last.device), last]
        return at_least_float32(returned).squeeze(-1)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Compute the micro-batch's share of the mean loss over the pairs of the optimizer step."""
        values, weights = self._by_name(batch), weights_of(batch)
        log_pairs(self, {name: values[name] for name in ("loss", "accuracy", "margin")}, weights)
        return self.token_loss((values["loss"] * weights).sum(), weights.sum())

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log loss, accuracy and margin."""
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log loss, accuracy and margin."""
        self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Compute loss, margin and scores of each pair, ``(pairs,)`` each."""
        return {name: values for name, values in self._by_name(batch).items() if name != "accuracy"}

    @override
    def _model_is_whole(self) -> None:
        assert self.model is not None
        self._head = head_names(self.model)[-1]

    def _by_name(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is said of each pair, ``(pairs,)`` each."""
        ids, mask = (batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask"))
        chosen, rejected = self(ids, mask).view(-1, 2).unbind(1)
        least = batch["margin"] if self.uses_margin and "margin" in batch else 0.0
        losses, margins = reward_model_loss(chosen, rejected, margin=least, centre=self.centre), chosen - rejected
        scores = {"chosen_score": chosen, "rejected_score": rejected}
        return {"loss": losses, "margin": margins, "accuracy": margins > 0, **scores}

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        weights = weights_of(batch)
        means = {"loss": self.mean_loss, "accuracy": self.mean_accuracy, "margin": self.mean_margin}
        add_pairs(means, self._by_name(batch), weights)
        logged = {f"{stage}_{name}": mean for name, mean in means.items()}
        self.log_dict(logged, on_epoch=True, prog_bar=True, batch_size=len(weights))
