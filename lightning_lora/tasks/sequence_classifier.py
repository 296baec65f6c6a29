"""Fine-tuning a pretrained model to classify whole sequences."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_lora.callbacks.progress import needs_metric
from lightning_lora.errors import TaskSettingError, check_count
from lightning_lora.tasks.head_chunks import at_least_float32
from lightning_lora.tasks.new_head import NewHeadTask


class SequenceClassifier(NewHeadTask):
    """Sequence classification: one class per row, with LoRA on the body and a new head trained in full.

    Batches are mappings with ``input_ids`` and ``attention_mask``, each ``(rows, tokens)``, and ``labels``
    ``(rows,)``. The loss is the mean over the rows of an optimizer step. Logged: ``train_loss``, and ``val_loss``,
    ``val_accuracy``, ``test_loss`` and ``test_accuracy`` as means over all rows. Prediction gives the class of each
    row.

    Args:
        model: Folder of a model on this machine, or its hub name. Weights must be stored as safetensors.
        num_labels: Number of classes, at least 2.
        settings: The settings of `PretrainedTask`, such as ``learning_rate`` and ``lora``.

    Raises:
        ConfigError: If a setting is refused, or the model cannot be found.
        TargetNotFoundError: If a LoRA pattern matches nothing in this model.
    """

    def __init__(self, model: str, num_labels: int, **settings: Any) -> None:
        check_count("num_labels", num_labels, TaskSettingError, least=2)
        self._num_outputs = num_labels
        super().__init__(model, **settings)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Compute the micro-batch's share of the mean loss over the rows of the optimizer step."""
        logits, labels = self(batch["input_ids"], batch["attention_mask"]), batch["labels"]
        loss_sum = F.cross_entropy(at_least_float32(logits), labels, reduction="sum")
        prog_bar = needs_metric(self._trainer, "train_loss")
        self.log("train_loss", loss_sum.detach() / len(labels), prog_bar=prog_bar, batch_size=len(labels))
        return self.token_loss(loss_sum, len(labels))

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Predict the class of each row, ``(rows,)``."""
        return self(batch["input_ids"], batch["attention_mask"]).argmax(-1)

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        logits, labels = self(batch["input_ids"], batch["attention_mask"]), batch["labels"]
        self.mean_loss.update(F.cross_entropy(at_least_float32(logits), labels, reduction="none"), len(labels))
        self.mean_accuracy.update(logits.argmax(-1) == labels, len(labels))
        metrics = {f"{stage}_loss": self.mean_loss, f"{stage}_accuracy": self.mean_accuracy}
        self.log_dict(metrics, on_epoch=True, prog_bar=True, batch_size=len(labels))
