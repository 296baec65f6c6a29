"""Supervised fine-tuning of a causal language model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM
from typing_extensions import override

from lightning_lora.config import LoRAConfig
from lightning_lora.tasks.pretrained import PretrainedTask

IGNORED = -100


class CausalLM(PretrainedTask):
    """Next-token prediction on the supervised tokens of each row (labels other than -100), with LoRA or in full.

    Batches are mappings with ``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, tokens)``, as
    `SFTDataModule` makes them. The loss is the mean over the supervised tokens of an optimizer step. Logged:
    ``train_loss``; ``val_loss`` and ``test_loss`` in nats per token, with perplexity and next-token accuracy.
    Prediction gives each row's mean loss and number of supervised tokens.

    Args:
        model: Folder of a model on this machine, or its hub name. Weights are read as safetensors only.
        learning_rate: The learning rate *of full fine-tuning*; adapters train at ``lora.lr_multiplier`` times it.
        lora: LoRA settings, or None for full fine-tuning.
        weight_decay: AdamW's decay of fully trained parameters; adapters have none.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        schedule: Learning rate after the warm-up: ``"constant"``, ``"linear"`` or ``"cosine"`` down to zero.
        dtype: Type of the base weights: ``"float32"``, ``"bfloat16"`` or ``"float16"``. None: that of the trainer's
            precision.
        quantization: ``"nf4"`` or ``"int8"`` loads the base in 4 or 8 bits (needs bitsandbytes; ``dtype`` is then the
            type of the arithmetic). None: as it is stored.
    """

    auto_class: ClassVar[Any] = AutoModelForCausalLM

    def __init__(
        self,
        model: str,
        learning_rate: float = 2e-5,
        lora: LoRAConfig | dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: str = "constant",
        dtype: str | None = None,
        quantization: str | None = None,
    ) -> None:
        super().__init__(model, learning_rate, lora, weight_decay, warmup_steps, schedule, dtype, quantization)
        self.save_hyperparameters()
        self.mean_loss = MeanMetric()
        self.mean_accuracy = MeanMetric()

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``(rows, tokens, vocab)``."""
        assert self.model is not None
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The micro-batch's share of the loss per supervised token of the optimizer step."""
        losses, _, supervised = self._token_losses(batch)
        num_tokens = supervised.sum()
        loss_sum = losses.sum()
        self.log("train_loss", loss_sum.detach() / num_tokens.clamp(min=1), prog_bar=True, batch_size=len(losses))
        return self.token_loss(loss_sum, num_tokens)

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add the rows to the running means."""
        self._measure(batch)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add the rows to the running means."""
        self._measure(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the means over all supervised tokens."""
        self._log_means("val")

    @override
    def on_test_epoch_end(self) -> None:
        """Log the means over all supervised tokens."""
        self._log_means("test")

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Mean loss of each row in nats per token, ``(rows,)``, and its number of supervised tokens."""
        losses, _, supervised = self._token_losses(batch)
        num_tokens = supervised.sum(-1)
        return {"loss": losses.sum(-1) / num_tokens.clamp(min=1), "tokens": num_tokens}

    def _token_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (0 where unsupervised), right predictions, and which tokens count, each ``(rows, tokens - 1)``."""
        logits = self(batch["input_ids"], batch["attention_mask"])[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(labels)
        return losses, logits.detach().argmax(-1) == labels, labels != IGNORED

    def _measure(self, batch: dict[str, Tensor]) -> None:
        losses, correct, supervised = self._token_losses(batch)
        weight = supervised.sum()
        if weight:
            self.mean_loss.update(losses.sum() / weight, weight)
            self.mean_accuracy.update((correct & supervised).sum() / weight, weight)

    def _log_means(self, stage: str) -> None:
        loss = self.mean_loss.compute()
        metrics = {"loss": loss, "perplexity": torch.exp(loss), "accuracy": self.mean_accuracy.compute()}
        # The metrics are those of all ranks already; sync_dist says so to Lightning, the mean of equals is the same.
        self.log_dict({f"{stage}_{name}": value for name, value in metrics.items()}, prog_bar=True, sync_dist=True)
