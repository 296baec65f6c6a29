"""Supervised fine-tuning of a causal language model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import AutoModelForCausalLM
from typing_extensions import override

from lightning_lora.batch.token_loss import one_if_zero
from lightning_lora.batch_facts import FACTS, facts_of
from lightning_lora.callbacks.progress import needs_metric
from lightning_lora.errors import ConfigError, DataError
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.mixin.memory_settings import choices_of, settings_of
from lightning_lora.tasks.attention.implementation import choose_for_packing
from lightning_lora.tasks.attention.mask import is_causal, known_packing
from lightning_lora.tasks.attention.packing_check import check_packing
from lightning_lora.tasks.end_of_turn import end_ids, from_record, stop_at, stopping_ids, to_record, tokenizer_of_data
from lightning_lora.tasks.head_chunks import IGNORE_INDEX, at_least_float32
from lightning_lora.tasks.head_loss import HeadScores, loss_as_logits, scores_as_logits
from lightning_lora.tasks.loss_at_head import compute_at_head, head_is_last, plain_head
from lightning_lora.tasks.pretrained import PretrainedTask
from lightning_lora.tasks.supervision import next_token_labels, next_token_weights, num_tokens, weighted
from lightning_lora.tasks.untrained_tokens import Unlearnable, frozen_output, unlearnable_tokens

_TOKENIZER_KEY = "lightning_lora_tokenizer"
# Of a fit: the user is told of tokens that cannot be learned if one of these holds them.
_FIRST_BATCHES = 16


class CausalLM(PretrainedTask):
    """Supervised fine-tuning of a causal language model: next-token prediction, with LoRA or in full.

    Batches are mappings with ``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, tokens)``, as
    `SFTDataModule` makes them. Labels other than -100 are supervised and are not shifted. The loss is the mean over
    the supervised tokens of an optimizer step. Logged: ``train_loss``; and for validation and test the loss in nats
    per token (``val_loss``), ``val_perplexity``, and next-token ``val_accuracy``. Prediction gives the mean loss and
    the number of supervised tokens of each row.

    A batch may have ``weights`` too, ``(rows, tokens)``: the loss is then the weighted mean, so that an example of
    weight 2 counts like the same example twice.

    Packed batches (``packing`` of `SFTDataModule`) have ``position_ids`` instead of ``attention_mask``, which start at
    0 with each example. Before the first packed batch of a run, `check_packing` verifies that the model keeps the
    examples apart, and refuses a model that does not. The first token of an example is never predicted from the
    example before it. `choose_for_packing` says which implementation of attention packed rows get. Batches of our data
    modules bring `BatchFacts` too, and no step then waits for the device; without, it does four times.

    If the model returns the output of a plain linear layer as its logits, the loss is computed in place of that layer
    (`lightning_lora.tasks.head_loss`), so that unsupervised tokens cost no product with it and logits are never held.
    """

    auto_class: ClassVar[Any] = AutoModelForCausalLM
    step_memory_choices = ("gate", "head_rows", "activation_checkpointing")
    # Whether the model returns the output of its output layer unchanged; None: not checked yet.
    _head_is_last: bool | None = None
    # Tokens that LoRA cannot learn to write; None if there are none, or once the user was told.
    _unlearnable: Unlearnable | None = None
    # The tokens at which the base stops; None: the model is not loaded yet.
    _stops_of_base: list[int] | None = None
    # Whether a token sees no later one, so that padding on the right needs no mask; None: not checked yet.
    _is_causal: bool | None = None
    # Whether the model keeps packed examples apart in a batch of several rows; None: not checked yet.
    _separates_rows: bool | None = None

    @override
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Compute the logits, ``(rows, tokens, vocab)``."""
        assert self.model is not None
        # Not every model takes positions; without them, a model counts by itself.
        positions = {} if position_ids is None else {"position_ids": position_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions).logits

    @override
    def on_fit_start(self) -> None:
        """Check packing and the end of turn again in every run, as model and data may have changed."""
        super().on_fit_start()
        self._separates_rows = self._is_causal = None
        self._trained_tokenizer = tokenizer_of_data(self._data(), self)
        self._look_at_ends()

    @override
    def on_train_start(self) -> None:
        """Check what a step would else wait for. A sharded model runs only within a step."""
        super().on_train_start()
        if not isinstance(self.trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            with self.trainer.precision_plugin.forward_context():
                self._needs_mask()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the tokenizer and chat template of the run if they are not the model's own."""
        super().on_save_checkpoint(checkpoint)
        if self._trained_tokenizer is not None:
            checkpoint[_TOKENIZER_KEY] = to_record(self._trained_tokenizer)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Find the tokenizer and chat template of the checkpoint's run, and stop where its answers end."""
        super().on_load_checkpoint(checkpoint)
        if _TOKENIZER_KEY in checkpoint:
            self._trained_tokenizer = from_record(checkpoint[_TOKENIZER_KEY], self)
        self._stop_at_ends()

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Compute the micro-batch's share of the mean loss over the supervised tokens of the optimizer step."""
        batch, num_rows = self._in_one_row_if_needed(batch), len(batch["input_ids"])
        labels, weights, facts = next_token_labels(batch), next_token_weights(batch), facts_of(batch)
        if self._unlearnable is not None and batch_idx < _FIRST_BATCHES:
            self._tell_of_unlearnable(labels)
        count = num_tokens(labels, weights, facts)
        loss_sum = self._compute_at_head(batch, partial(loss_as_logits, labels=labels, factors=weights, facts=facts))
        if loss_sum is None:
            loss_sum = weighted(self._scores_from_logits(batch).losses, weights).sum()
        loss_sum = loss_sum.squeeze()
        prog_bar = needs_metric(self._trainer, "train_loss")
        self.log("train_loss", loss_sum.detach() / one_if_zero(count), prog_bar=prog_bar, batch_size=num_rows)
        return self.token_loss(loss_sum, count)

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add the rows to the running means."""
        self._evaluate(batch)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add the rows to the running means."""
        self._evaluate(batch)

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
        """Compute the mean loss of each row in nats per token, ``(rows,)``, and its number of supervised tokens."""
        num_tokens = (next_token_labels(batch) != IGNORE_INDEX).sum(-1)
        return {"loss": self._scores(batch).losses.sum(-1) / num_tokens.clamp(min=1), "tokens": num_tokens}

    def _scores(self, batch: dict[str, Tensor]) -> HeadScores:
        """Loss and correctness of the prediction after each token, without gradients."""
        shape, batch = batch["input_ids"].shape, self._in_one_row_if_needed(batch)
        at_head = partial(scores_as_logits, labels=next_token_labels(batch), facts=facts_of(batch))
        scores = self._compute_at_head(batch, at_head)
        if scores is None:
            losses, correct = self._scores_from_logits(batch)
        else:
            losses, correct = scores[..., 0], scores[..., 1].bool()
        return HeadScores(losses.view(shape), correct.view(shape))

    def _scores_from_logits(self, batch: dict[str, Tensor]) -> HeadScores:
        """Loss and correctness computed from the logits; the losses have gradients."""
        logits, labels = self._logits(batch), next_token_labels(batch)
        losses = F.cross_entropy(
            at_least_float32(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        ).view_as(labels)
        return HeadScores(losses, logits.detach().argmax(-1) == labels)

    def _compute_at_head(self, batch: dict[str, Tensor], compute: Callable[..., Tensor]) -> Tensor | None:
        """Run the model with ``compute`` in place of its output layer; None if the layer itself must run."""
        assert self.model is not None
        if facts_of(batch) is not None:
            self._needs_mask()  # which runs the layer
        head = plain_head(self.model)
        if head is None or self._head_is_last is False:
            return None
        if self._head_is_last is None:
            few = batch["input_ids"][:1, :2]
            with known_packing(False):
                self._head_is_last = head_is_last(head, lambda: self(few))
        # What a training step has room for says nothing of an evaluation.
        memory = choices_of(self) if self.training else settings_of(self)
        compute = partial(compute, chunk_rows=memory.chunk_rows)
        result = compute_at_head(head, lambda: self._logits(batch), compute) if self._head_is_last else None
        self._head_is_last = result is not None
        return result

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        facts = facts_of(batch)
        with nullcontext() if facts is None or torch.compiler.is_compiling() else known_packing(facts.packed):
            return self._logits_of_rows(batch, needs_mask=facts is None or self._needs_mask())

    def _logits_of_rows(self, batch: dict[str, Tensor], needs_mask: bool) -> Tensor:
        if "position_ids" not in batch:
            return self(batch["input_ids"], batch["attention_mask"] if needs_mask else None)
        if "attention_mask" in batch:
            # With a mask, transformers does not read examples off the positions, and they would see each other.
            raise DataError(
                "a batch has attention_mask (padded rows) or position_ids (packed rows), not both: drop one."
            )
        return self(batch["input_ids"], position_ids=batch["position_ids"])

    def _needs_mask(self) -> bool:
        """Whether padding on the right must be masked."""
        if self._is_causal is None:
            assert self.model is not None
            self._is_causal = is_causal(self.model, self, self.vocab_size)
        return not self._is_causal

    @override
    def _model_is_whole(self) -> None:
        """Let the model stop where answers end; later, a strategy may have sharded its output layer."""
        assert self.model is not None
        self._stops_of_base = stopping_ids(getattr(self.model, "generation_config", None), ())
        if self._trainer is None or self._trainer.state.fn != "fit":
            self._stop_at_ends()
        elif isinstance(self._trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            self._trained_tokenizer = tokenizer_of_data(self._data(), self)
            self._look_at_ends()

    def _data(self) -> Any:
        """The data module of the run, or None."""
        return getattr(self._trainer, "datamodule", None)

    def _stop_at_ends(self) -> list[int]:
        """Add the tokens that end an answer to those at which the model stops, and return them."""
        if self.model is None or self._stops_of_base is None:
            return []
        try:
            ends = end_ids(self.trained_tokenizer)
        except ConfigError:  # a model without a tokenizer
            return []
        stop_at(self.model, list(dict.fromkeys([*self._stops_of_base, *ends])))
        return ends

    def _look_at_ends(self) -> None:
        """Let the model stop where answers end, and find out which tokens of the answers LoRA cannot learn."""
        ends = self._stop_at_ends()
        if not lora_layers(self) or not ends or frozen_output(self.model) is None:
            return
        stops, settings = [*(self._stops_of_base or []), *ends], getattr(self._data(), "settings", None)
        others = [getattr(settings, "end_of_answer", None)]
        self._unlearnable = unlearnable_tokens(
            self.model, self.trained_tokenizer, ends, stops, others, self.num_pretrained_tokens
        )

    def _tell_of_unlearnable(self, labels: Tensor) -> None:
        assert self._unlearnable is not None
        advice = self._unlearnable.advice(labels)
        if advice is not None:
            rank_zero_warn(advice)
            self._unlearnable = None

    def _in_one_row_if_needed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reshape a packed batch to one row if the model keeps examples apart only in a single row."""
        if "position_ids" not in batch:
            return batch
        if self._separates_rows is None:
            assert self.model is not None
            self._separates_rows = choose_for_packing(
                self.model,
                tuple(batch["input_ids"].shape),
                partial(check_packing, self.model, self, self.vocab_size),
                is_given=self.attn_implementation is not None,
                device=self.device.type,
            )
        if self._separates_rows:
            return batch
        names = {"input_ids", "labels", "position_ids", "weights"} & batch.keys()
        facts = facts_of(batch)
        known: dict[str, Any] = {} if facts is None else {FACTS: facts.joined()}
        return {name: batch[name].reshape(1, -1) for name in names} | known

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        labels, weights = next_token_labels(batch), next_token_weights(batch)
        losses, correct = self._scores(batch)
        count = num_tokens(labels, weights, facts_of(batch))
        self.mean_loss.update(weighted(losses, weights), count)
        self.mean_accuracy.update(weighted(correct & (labels != IGNORE_INDEX), weights), count)

    def _log_means(self, stage: str) -> None:
        loss = self.mean_loss.compute()
        metrics = {"loss": loss, "perplexity": torch.exp(loss), "accuracy": self.mean_accuracy.compute()}
        # The metrics are over all ranks already; sync_dist tells Lightning so, and a mean of equal values is the same.
        self.log_dict({f"{stage}_{name}": value for name, value in metrics.items()}, prog_bar=True, sync_dist=True)
