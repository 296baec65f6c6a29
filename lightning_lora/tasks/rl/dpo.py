"""Direct preference optimisation of a causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_lora.batch.trial_step import on_device
from lightning_lora.batch_facts import FACTS, facts_of
from lightning_lora.capacity.fixed_rows import validation_loaders
from lightning_lora.checkpoints.loader_position import generators
from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.errors import PolicySettingError, check_arguments, no_effect
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.evaluation_mode import in_eval_mode
from lightning_lora.tasks.head_chunks import IGNORE_INDEX
from lightning_lora.tasks.rl.functional.head_logprobs import head_logprobs, logprobs_of_logits
from lightning_lora.tasks.rl.functional.preference_loss import check_preference_settings, preference_loss
from lightning_lora.tasks.rl.pair_means import add_pairs, log_pairs, weights_of
from lightning_lora.tasks.rl.policy import Policy
from lightning_lora.tasks.running_mean import RunningMean


class PairScores(NamedTuple):
    """What a policy says of the pairs of a batch.

    Args:
        losses: ``(pairs,)``, nats.
        rewards: ``beta`` times the log-ratio to the reference, ``(pairs, 2)``, the chosen answer first.
    """

    losses: Tensor
    rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """By how much the reward of the chosen answer is ahead, ``(pairs,)``."""
        return self.rewards[:, 0] - self.rewards[:, 1]

    def by_name(self) -> dict[str, Tensor]:
        """What is logged of each pair, ``(pairs,)`` each."""
        rewards = {"chosen_reward": self.rewards[:, 0], "rejected_reward": self.rewards[:, 1]}
        return {"loss": self.losses, "margin": self.margins, "accuracy": self.margins > 0, **rewards}


class DPO(Policy):
    """Direct preference optimisation: a language model learns to prefer the chosen answer of each pair.

    Batches are mappings with ``input_ids``, ``attention_mask`` and ``labels``, each ``(pairs, 2, tokens)`` with the
    chosen row of a pair first, as `PreferenceDataModule` makes them. The loss is the mean over the pairs of an
    optimizer step. Both rows of all pairs go through the model at once, and once more, without gradients, as the
    reference: the same model with its adapters off, so there is no second one. Logits are never held. Dropout is off.

    Logged: ``train_loss``, and for validation and test ``val_loss``, ``val_accuracy`` (share of pairs of which the
    chosen answer has the higher reward; a tie is no win) and ``val_margin``. A reward is ``beta`` times the log-ratio
    of policy and reference, summed over an answer; ``chosen_reward`` and ``rejected_reward`` are logged for each stage.
    Prediction gives loss, margin and both rewards of each pair.

    Args:
        model: Folder of a model on this machine, or its hub name. It should have learned from chats before.
        learning_rate: The learning rate *of full fine-tuning*; see `PretrainedTask`.
        lora: LoRA settings. None trains the whole model (full fine-tuning).
        loss: ``"sigmoid"``, ``"ipo"`` (averaged over the tokens of an answer), ``"hinge"``, ``"robust"``,
            ``"length_normalised"`` or ``"dpop"``: see `lightning_lora.tasks.rl.preference_loss`.
        beta: Strength of the pull to the reference. With ``"length_normalised"`` 2 to 5 suit, else 0.1.
        label_smoothing: Share of pairs taken to be labelled the wrong way round, at least 0 and below 0.5.
        nll_weight: Adds so much of the chosen answer's loss per token, which keeps it likely.
        dpop_weight: What it costs with ``"dpop"`` that the chosen answer gets less likely.
        reference: ``"adapter_off"`` (the base), ``"frozen"`` (a copy of the adapter as training begins) or
            ``"precomputed"`` (log-probabilities of all rows, computed when training begins). None takes the base for a
            new adapter, a copy for one that was loaded, and precomputed numbers without LoRA.
        settings: The other settings of `PretrainedTask`.

    Raises:
        ConfigError: If a setting is refused, or the model cannot be found.
        TargetNotFoundError: If a LoRA pattern matches nothing in this model.

    References:
        Rafailov et al., 2023, https://arxiv.org/abs/2305.18290.
    """

    rows_per_sample: ClassVar[int] = 2
    """Rows of a batch that belong to one independent sample: both answers of a pair."""

    def __init__(
        self,
        model: str,
        learning_rate: float = 1e-6,
        lora: LoRAConfig | dict[str, Any] | None = None,
        loss: str = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        nll_weight: float = 0.0,
        dpop_weight: float = 50.0,
        reference: str | None = None,
        **settings: Any,
    ) -> None:
        check_arguments(DPO, locals(), PolicySettingError)
        check_preference_settings(loss, beta, label_smoothing, dpop_weight, nll_weight)
        if loss != "dpop" and (told := no_effect(DPO, locals(), ("dpop_weight",), "only loss='dpop' reads it")):
            rank_zero_warn(told)
        super().__init__(model, learning_rate, lora, reference, **settings)
        self.beta = beta
        self._loss = {"kind": loss, "beta": beta, "label_smoothing": label_smoothing}
        self._loss |= {"nll_weight": nll_weight, "dpop_weight": dpop_weight}
        self.mean_margin, self.mean_chosen, self.mean_rejected = RunningMean(), RunningMean(), RunningMean()
        self._told = False

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Compute the micro-batch's share of the mean loss over the pairs of the optimizer step."""
        scores, weights = self.score(batch), weights_of(batch)
        log_pairs(self, scores.by_name(), weights)
        return self.token_loss((scores.losses * weights).sum(), weights.sum())

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Compute loss, margin and rewards of each pair, ``(pairs,)`` each."""
        return {name: values for name, values in self.score(batch).by_name().items() if name != "accuracy"}

    def score(self, batch: Mapping[str, Tensor]) -> PairScores:
        """Compare the policy, as it is now, with the reference on the pairs of a batch."""
        rows = _rows(batch)
        # First the reference: its weights change in place, which a waiting graph of the policy would not survive.
        reference = self._of_reference(rows)
        sums = self._logprobs(rows)
        chosen, rejected = sums.view(-1, 2).unbind(1)
        ref_chosen, ref_rejected = reference.view(-1, 2).to(sums.dtype).unbind(1)
        lengths = (rows["labels"][:, 1:] != IGNORE_INDEX).sum(-1).view(-1, 2).unbind(1)
        names = ("chosen_lengths", "rejected_lengths")
        given = dict(zip(names, lengths, strict=True))
        losses = preference_loss(chosen, rejected, ref_chosen, ref_rejected, **self._loss, **given)
        return PairScores(losses, self.beta * (sums.detach() - reference).view(-1, 2))

    def _of_reference(self, rows: dict[str, Tensor]) -> Tensor:
        """Log-probabilities of rows under the reference, ``(rows,)``, without gradients."""
        assert self.model is not None
        if self.reference.kind != "precomputed":
            self.reference.fix(self.model)
            with self.reference.weights(self.model):
                return self._logprobs(rows)
        found = self.reference.look_up(rows["input_ids"], rows["labels"])
        if found is None:
            with torch.no_grad():
                found = self._logprobs(rows)
            self.reference.keep(rows["input_ids"], rows["labels"], found)
        return found

    def _logprobs(self, rows: dict[str, Tensor]) -> Tensor:
        """The log-probability of the answer of each row, summed over its tokens, ``(rows,)``."""
        ids = F.pad(rows["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        mask = ids != IGNORE_INDEX
        found = self._compute_at_head(rows, partial(_at_head, ids=ids, mask=mask, facts=facts_of(rows)))
        if found is None:
            found = logprobs_of_logits(self._logits(rows), ids, mask).logprobs[..., None]
        return found.sum((1, 2))

    @override
    def _fix_reference(self) -> None:
        if self.reference.kind == "precomputed":
            self._precompute()
        super()._fix_reference()

    def _precompute(self) -> None:
        """Compute the reference of all training and validation rows; a collective."""
        loaders = [*_listed(self.trainer.train_dataloader), *_listed(validation_loaders(self.trainer))]
        with (
            kept_random_state(self.device, generators(loaders)),
            in_eval_mode(self),
            self.trainer.precision_plugin.forward_context(),
        ):
            for batch in (batch for loader in loaders for batch in loader):
                self._of_reference(_rows(on_device(self.trainer, batch)))
        self.reference.share()

    @override
    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        add_pairs(self._means(), self.score(batch).by_name(), weights_of(batch))

    def _means(self) -> dict[str, RunningMean]:
        """The means of an evaluation by name."""
        means = {"loss": self.mean_loss, "accuracy": self.mean_accuracy, "margin": self.mean_margin}
        return means | {"chosen_reward": self.mean_chosen, "rejected_reward": self.mean_rejected}

    @override
    def _log_means(self, stage: str) -> None:
        found = {f"{stage}_{name}": metric.compute() for name, metric in self._means().items()}
        self.log_dict(found, prog_bar=True, sync_dist=True)
        if found[f"{stage}_margin"] > 0 > found[f"{stage}_chosen_reward"] and not self._told:
            self._told = True
            rank_zero_warn(
                "the margin grows because both answers get less likely, the rejected one faster: the policy unlearns "
                "the chosen answers too. Set nll_weight=1 or loss='dpop', or a smaller learning rate."
            )


def _at_head(**head: Any) -> Tensor:
    # Stacked, because FSDP2 warns if a model returns a view.
    return torch.stack([head_logprobs(**head).logprobs], -1)


def _rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Both rows of all pairs below each other, ``(2 pairs, tokens)`` each."""
    rows = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")}
    return rows | {FACTS: batch.get(FACTS)}


def _listed(loaders: Any) -> list[Any]:
    return list(tree_leaves(loaders)) if loaders is not None else []
