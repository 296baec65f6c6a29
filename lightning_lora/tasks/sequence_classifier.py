"""Fine-tuning a pretrained model to classify whole sequences."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification
from typing_extensions import override

from lightning_lora.errors import ConfigError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.targets.roles import module_roles
from lightning_lora.tasks.pretrained import PretrainedTask


class SequenceClassifier(PretrainedTask):
    """One class per row; the new classification head is trained in full beside the adapters.

    Batches are mappings with ``input_ids`` and ``attention_mask`` ``(rows, tokens)`` and ``labels`` ``(rows,)``. The
    loss is the mean over the rows of an optimizer step. Logged: ``train_loss``; loss and accuracy of validation and
    test.

    Args:
        model: Folder of a model on this machine, or its hub name. Weights are read as safetensors only.
        num_labels: Number of classes, at least 2.
        learning_rate: The learning rate *of full fine-tuning*; adapters train at ``lora.lr_multiplier`` times it, the
            head at this one.
        lora: LoRA settings, or None for full fine-tuning.
        weight_decay: AdamW's decay of fully trained parameters; adapters have none.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        schedule: Learning rate after the warm-up: ``"constant"``, ``"linear"`` or ``"cosine"`` down to zero.
        dtype: Type of the base weights: ``"float32"``, ``"bfloat16"`` or ``"float16"``. None: that of the trainer's
            precision.
        quantization: ``"nf4"`` or ``"int8"`` loads the base in 4 or 8 bits (needs bitsandbytes; ``dtype`` is then the
            type of the arithmetic). None: as it is stored.
    """

    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    new_head: ClassVar[bool] = True

    def __init__(
        self,
        model: str,
        num_labels: int,
        learning_rate: float = 2e-5,
        lora: LoRAConfig | dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: str = "constant",
        dtype: str | None = None,
        quantization: str | None = None,
    ) -> None:
        if not isinstance(num_labels, int) or num_labels < 2:
            raise ConfigError(f"num_labels must be an integer of at least 2, got {num_labels!r}.")
        self._num_labels = num_labels
        super().__init__(model, learning_rate, lora, weight_decay, warmup_steps, schedule, dtype, quantization)
        if self.model_config.pad_token_id is None:
            # The head reads the last token that is not padding.
            pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
            self.model_config.pad_token_id = end if pad is None else pad
        self.save_hyperparameters()
        self.mean_loss = MeanMetric()
        self.accuracy = MulticlassAccuracy(num_labels, average="micro")

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``(rows, num_labels)``."""
        assert self.model is not None
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The micro-batch's share of the mean loss over the rows of the optimizer step."""
        logits, labels = self(batch["input_ids"], batch["attention_mask"]), batch["labels"]
        loss_sum = F.cross_entropy(logits.float(), labels, reduction="sum")
        self.log("train_loss", loss_sum.detach() / len(labels), prog_bar=True, batch_size=len(labels))
        return self.token_loss(loss_sum, labels.new_tensor(len(labels)))

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._measure(batch, "val")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._measure(batch, "test")

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Class of each row, ``(rows,)``."""
        return self(batch["input_ids"], batch["attention_mask"]).argmax(-1)

    def _measure(self, batch: dict[str, Tensor], stage: str) -> None:
        logits, labels = self(batch["input_ids"], batch["attention_mask"]), batch["labels"]
        self.mean_loss(F.cross_entropy(logits.float(), labels), len(labels))
        self.accuracy(logits, labels)
        metrics = {f"{stage}_loss": self.mean_loss, f"{stage}_accuracy": self.accuracy}
        self.log_dict(metrics, on_epoch=True, prog_bar=True, batch_size=len(labels))

    @override
    def _model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": self._num_labels}

    @override
    def _trained_modules(self, skeleton: nn.Module, config: LoRAConfig) -> tuple[str, ...]:
        heads = [name for name, role in module_roles(skeleton).items() if role == "head"]
        return tuple(dict.fromkeys([*config.trainable, *heads]))
