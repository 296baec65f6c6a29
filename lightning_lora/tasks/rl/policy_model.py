"""A causal language model that says how likely sampled tokens are, and what it expects of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from typing_extensions import override

from lightning_lora.errors import PolicySettingError, check_choice
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.sharding import shard_lora
from lightning_lora.tasks.rl.functional.head_logprobs import head_logprobs, logprobs_of_logits
from lightning_lora.tasks.rl.policy import Policy
from lightning_lora.tasks.rl.policy_settings import PolicySettings
from lightning_lora.tasks.rl.rollout_maker import TokenScores
from lightning_lora.tasks.rl.value_head import ValueHead


class PolicyModel(Policy):
    """A policy that scores sampled tokens, with a value head if it needs one.

    A subclass sets ``policy_settings`` before it calls this constructor.

    Args:
        model: Folder of a model on this machine, or its hub name.
        learning_rate: See `PretrainedTask`.
        lora: See `PretrainedTask`.
        reference: See `PolicyGradient`.
        settings: The other settings of `PretrainedTask`.
    """

    policy_settings: PolicySettings

    def __init__(
        self,
        model: str,
        learning_rate: float = 2e-5,
        lora: LoRAConfig | dict[str, Any] | None = None,
        reference: str | None = None,
        **settings: Any,
    ) -> None:
        check_choice("reference of a policy", reference, ("adapter_off", "frozen"), PolicySettingError, optional=True)
        if reference is not None and not self.policy_settings.has_reference:
            raise PolicySettingError(
                f"reference={reference!r} has no effect with kl_coefficient=0: leave out one of them."
            )
        super().__init__(model, learning_rate, lora, reference, **settings)
        self.value_head: ValueHead | None = None

    @property
    @override
    def has_reference(self) -> bool:
        """Whether the policy is held near its reference."""
        return self.policy_settings.has_reference

    @override
    def configure_model(self) -> None:
        """Load the base, adapt it, and add the value head."""
        if self.policy_settings.has_values and self.value_head is None:
            self.value_head = ValueHead(self.model_config.get_text_config().hidden_size)
        super().configure_model()
        strategy = getattr(self._trainer, "strategy", None)
        if self.value_head is not None and isinstance(strategy, ModelParallelStrategy):
            # Its gradient is then averaged over ranks, as all others are.
            shard_lora(self.value_head, strategy.device_mesh)

    @override
    def _model_is_whole(self) -> None:
        """Refuse to train low-precision weights in full: no comparison with adapters would be fair."""
        super()._model_is_whole()
        narrow = {str(p.dtype).removeprefix("torch.") for p in self.parameters() if p.element_size() < 4}
        is_trained = self._trainer is not None and self._trainer.state.fn == "fit"
        if is_trained and self.lora is None and narrow:
            raise PolicySettingError(
                f"the weights are {', '.join(sorted(narrow))} and lora=None trains them all: the small updates of RL "
                "round to nothing there. Set dtype='float32' and precision '32-true' or 'bf16-mixed', or give lora."
            )

    def score(self, batch: Mapping[str, Any]) -> TokenScores:
        """What the policy, as it is now, says of the sampled tokens of a minibatch."""
        ids, mask = F.pad(batch["input_ids"][:, 1:], (0, 1)), batch["mask"]
        at_head = partial(
            _scores, ids=ids, mask=mask, temperature=self.policy_settings.temperature, value_head=self.value_head
        )
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        scores = self._compute_at_head(inputs, at_head)
        if scores is None:
            scores = self._scores_of_tokens(inputs, ids, mask)
        logprobs, entropy, *values = scores.unbind(-1)
        return TokenScores(logprobs, entropy.detach(), values[0] if values else None)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """The model is its own reference: within the context it computes what it did when training began."""
        assert self.model is not None
        with self.reference.weights(self.model):
            yield

    def _scores_of_tokens(self, inputs: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        """The same for a model whose output layer must run itself."""
        assert self.model is not None
        hidden: list[Tensor] = []
        head = self.model.get_output_embeddings()
        assert head is not None
        handle = head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        try:
            found = logprobs_of_logits(self._logits(inputs), ids, mask, self.policy_settings.temperature)
        finally:
            handle.remove()
        values = [] if self.value_head is None else [self.value_head(hidden[0])]
        return torch.stack([*found, *values], -1)

    @override
    def _resolve_lora(self, config: LoRAConfig) -> LoRAConfig:
        """Train the value head in full; it lies beside the model, where patterns of the model do not reach."""
        config = super()._resolve_lora(config)
        own = ("value_head",) if self.policy_settings.has_values and "value_head" not in config.trainable else ()
        return dataclasses.replace(config, trainable=(*config.trainable, *own))


def _scores(
    hidden: Tensor, ids: Tensor, mask: Tensor, temperature: float, value_head: ValueHead | None, **head: Any
) -> Tensor:
    """Log-probabilities, entropies and values of all tokens, ``(rows, tokens, 2 or 3)``."""
    found = head_logprobs(hidden=hidden, ids=ids, mask=mask, temperature=temperature, **head)
    values = [] if value_head is None else [value_head(hidden)]
    return torch.stack([*found, *values], -1)
