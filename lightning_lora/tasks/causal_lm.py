"""Supervised fine-tuning of a causal language model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM
from typing_extensions import override

from lightning_lora.errors import DataError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.tasks.head_loss import IGNORED, HeadScores, head_loss, head_scores
from lightning_lora.tasks.loss_at_head import at_head, hands_out, plain_head
from lightning_lora.tasks.packing_check import check_packing
from lightning_lora.tasks.pretrained import PretrainedTask


class CausalLM(PretrainedTask):
    """Next-token prediction on the supervised tokens of each row (labels other than -100), with LoRA or in full.

    Batches are mappings with ``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, tokens)``, as
    `SFTDataModule` makes them. The loss is the mean over the supervised tokens of an optimizer step. Logged:
    ``train_loss``; ``val_loss`` and ``test_loss`` in nats per token, with perplexity and next-token accuracy.
    Prediction gives each row's mean loss and number of supervised tokens.

    Packed batches (``packing`` of `SFTDataModule`) have ``position_ids`` in the place of ``attention_mask``, starting
    at 0 with each example. The first of a run makes the model prove that it keeps examples apart; a model that does
    not is refused. The first token of an example is never predicted from the example before it.

    Where the model's output layer is a plain linear and its output the logits, the loss is computed in its place
    (`lightning_lora.tasks.head_loss`): unsupervised tokens cost no product with it, and logits are never held.

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
    # Whether the model's logits are its output layer's very output; None: not asked yet.
    _head_is_last: bool | None = None
    # Whether packed examples may be in several rows of a batch rather than in one; None: not asked yet.
    _keeps_rows: bool | None = None

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
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits ``(rows, tokens, vocab)``."""
        assert self.model is not None
        # Not every model takes positions; those that do count by themselves without.
        positions = {} if position_ids is None else {"position_ids": position_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions).logits

    @override
    def on_fit_start(self) -> None:
        """Trust no answer of another run: the model may have changed."""
        super().on_fit_start()
        self._keeps_rows = None

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The micro-batch's share of the loss per supervised token of the optimizer step."""
        batch, num_rows = self._laid_out(batch), len(batch["input_ids"])
        labels = _next_tokens(batch)
        num_tokens = (labels != IGNORED).sum()
        loss_sum = self._at_head(batch, partial(_loss_sum, labels=labels))
        loss_sum = self._plain_scores(batch).losses.sum() if loss_sum is None else loss_sum.squeeze()
        self.log("train_loss", loss_sum.detach() / num_tokens.clamp(min=1), prog_bar=True, batch_size=num_rows)
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
        num_tokens = (_next_tokens(batch) != IGNORED).sum(-1)
        return {"loss": self._scores(batch).losses.sum(-1) / num_tokens.clamp(min=1), "tokens": num_tokens}

    def _scores(self, batch: dict[str, Tensor]) -> HeadScores:
        """Of each token, how well the next one is predicted; without gradients."""
        shape, batch = batch["input_ids"].shape, self._laid_out(batch)
        scores = self._at_head(batch, partial(_stacked_scores, labels=_next_tokens(batch)))
        if scores is None:
            losses, correct = self._plain_scores(batch)
        else:
            losses, correct = scores[..., 0], scores[..., 1].bool()
        return HeadScores(losses.view(shape), correct.view(shape))

    def _plain_scores(self, batch: dict[str, Tensor]) -> HeadScores:
        """The same from logits, with gradients of the losses."""
        logits, labels = self._logits(batch), _next_tokens(batch)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(labels)
        return HeadScores(losses, logits.detach().argmax(-1) == labels)

    def _at_head(self, batch: dict[str, Tensor], compute: Callable[..., Tensor]) -> Tensor | None:
        """``compute`` in the place of the output layer; None if that layer must run."""
        assert self.model is not None
        head = plain_head(self.model)
        if head is None or self._head_is_last is False:
            return None
        if self._head_is_last is None:
            few = batch["input_ids"][:1, :2]
            self._head_is_last = hands_out(head, lambda: self(few, torch.ones_like(few)))
        result = at_head(head, lambda: self._logits(batch), compute) if self._head_is_last else None
        self._head_is_last = result is not None
        return result

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        if "position_ids" not in batch:
            return self(batch["input_ids"], batch["attention_mask"])
        if "attention_mask" in batch:
            # transformers then looks for no examples in the positions, and they would see each other.
            raise DataError(
                "a batch has attention_mask (padded rows) or position_ids (packed rows), not both: drop one."
            )
        return self(batch["input_ids"], position_ids=batch["position_ids"])

    def _laid_out(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch in as many rows as the model keeps apart."""
        if "position_ids" not in batch:
            return batch
        if self._keeps_rows is None:
            assert self.model is not None
            self._keeps_rows = check_packing(self.model, self, self.vocab_size)
        if self._keeps_rows:
            return batch
        return {name: batch[name].reshape(1, -1) for name in ("input_ids", "labels", "position_ids")}

    def _measure(self, batch: dict[str, Tensor]) -> None:
        supervised = _next_tokens(batch) != IGNORED
        losses, correct = self._scores(batch)
        weight = supervised.sum()
        if weight:
            self.mean_loss.update(losses.sum() / weight, weight)
            self.mean_accuracy.update((correct & supervised).sum() / weight, weight)

    def _log_means(self, stage: str) -> None:
        loss = self.mean_loss.compute()
        metrics = {"loss": loss, "perplexity": torch.exp(loss), "accuracy": self.mean_accuracy.compute()}
        # The metrics are those of all ranks already; sync_dist says so to Lightning, the mean of equals is the same.
        self.log_dict({f"{stage}_{name}": value for name, value in metrics.items()}, prog_bar=True, sync_dist=True)


def _next_tokens(batch: dict[str, Tensor]) -> Tensor:
    """The label of each token's successor, ``(rows, tokens)``; none for the last of an example."""
    labels = batch["labels"][:, 1:]
    if "position_ids" in batch:
        # Where transformers sees an example begin.
        labels = labels.masked_fill(batch["position_ids"].diff() != 1, IGNORED)
    return F.pad(labels, (0, 1), value=IGNORED)


def _loss_sum(labels: Tensor, **head: Any) -> Tensor:
    # No view: FSDP2 warns of models that return one.
    return head_loss(labels=labels, **head).view(1, 1, 1).clone()


def _stacked_scores(labels: Tensor, **head: Any) -> Tensor:
    losses, correct = head_scores(labels=labels, **head)
    return torch.stack([losses, correct.to(losses.dtype)], -1)
