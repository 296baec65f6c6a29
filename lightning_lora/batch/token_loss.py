"""A loss per supervised token of the optimizer step, exact under accumulation and data parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.lightning_private import searching_schedule
from lightning_lora.lora.shards import local_shard
from lightning_lora.sharding.collectives import gather_on_rank_zero

# Sums over thousands of tokens would overflow float16. Dividing by a power of two does not round.
_SUM_SCALE = 1024.0
_KEY = "lightning_lora_window_tokens"


class TokenWeightedLoss(LightningModule):
    r"""Gives every supervised token of an optimizer step the same weight.

    Lightning averages the means of micro-batches, then of ranks, so a token in a short micro-batch weighs more. Here
    ``training_step`` returns ``token_loss(sum, count)``, and before the step the gradients are divided by the number of
    tokens in all micro-batches of all ranks, also in a shorter last window. ``k`` micro-batches of ``b`` rows, or ``k``
    ranks, then give the gradient of one batch of ``k b`` rows.

    References:
        https://github.com/Lightning-AI/pytorch-lightning/issues/20350
    """

    # Tokens of the open window; None: there is none, or the losses of its micro-batches are means.
    _window_tokens: Tensor | float | None = None
    _told_of_engine = False

    def token_loss(self, loss_sum: Tensor, num_tokens: Tensor | float) -> Tensor:
        """The value that ``training_step`` must return.

        Args:
            loss_sum: Sum of the losses of the supervised tokens of this micro-batch, nats.
            num_tokens: Number of supervised tokens of this micro-batch, or the sum of their weights. On one device a
                number of the host costs no wait.
        """
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            if not self._told_of_engine:
                rank_zero_warn("DeepSpeed steps inside its engine: the loss is a mean of means over micro-batches.")
            self._told_of_engine = True
            return loss_sum / one_if_zero(num_tokens)
        if searching_schedule(self.trainer) is not None:
            # Lightning compares what the steps of a search return, and sums of more tokens are larger.
            return loss_sum / one_if_zero(num_tokens)
        own = num_tokens.detach() if isinstance(num_tokens, Tensor) else num_tokens
        self._window_tokens = own if self._window_tokens is None else self._window_tokens + own
        return loss_sum / _SUM_SCALE

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the tokens that each rank has counted in an open accumulation window."""
        super().on_save_checkpoint(checkpoint)
        tokens = self._window_tokens
        if tokens is not None:
            checkpoint[_KEY] = gather_on_rank_zero(tokens.item() if isinstance(tokens, Tensor) else tokens)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the tokens of an open accumulation window."""
        super().on_load_checkpoint(checkpoint)
        counted = checkpoint.get(_KEY, [])
        if self._trainer is not None and len(counted) == self.trainer.world_size:
            self._window_tokens = counted[self.trainer.global_rank]

    @override
    def on_train_epoch_start(self) -> None:
        """Forget a window that an interruption left open: no window spans two epochs."""
        super().on_train_epoch_start()
        self._window_tokens = None

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the tokens of the step; runs after unscaling and before clipping."""
        super().on_before_optimizer_step(optimizer)
        # A collective: a rank that holds no trained entry under FSDP1 must call it too.
        factor = self._factor()
        self._window_tokens = None
        # With manual optimization several optimizers may step after one backward pass, and hold the same parameters.
        optimizers = {id(each): each for each in (optimizer, *self.trainer.optimizers)}.values()
        held = {id(p): p for each in optimizers for group in each.param_groups for p in group["params"]}
        multiply([p.grad for p in held.values() if p.grad is not None], factor)

    def gradient_factor(self) -> float:
        """The factor that makes the gradient of the open window a mean over its tokens; a collective."""
        return float(self._factor())

    def _factor(self) -> Tensor | float:
        """The same, in float64 on the device where the count is there."""
        if self._window_tokens is None:
            return 1.0
        tokens, ranks = self._over_ranks(self._window_tokens)
        # Lightning has divided by the accumulation and averaged over ranks: both are undone here.
        scale = _SUM_SCALE * ranks * self.trainer.accumulate_grad_batches
        if not isinstance(tokens, Tensor):
            return scale / (tokens or 1)
        # Not `scale / tokens`, which torch computes by the reciprocal.
        return torch.full_like(tokens, scale) / one_if_zero(tokens)

    def mean_of_micro_batch(self, returned: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss per token, nats, and the number of tokens, of what ``training_step`` has just returned.

        The window is empty before and afterwards: this is for passes between steps.

        Args:
            returned: What ``training_step`` returned for the only micro-batch of the window.
        """
        tokens, self._window_tokens = self._window_tokens, None
        if tokens is None:
            return returned, torch.ones((), device=returned.device)  # a mean already: see `token_loss`
        if not isinstance(tokens, Tensor):
            tokens = torch.full((), tokens, device=returned.device)
        return returned * _SUM_SCALE / one_if_zero(tokens), tokens

    def _over_ranks(self, tokens: Tensor | float) -> tuple[Tensor | float, int]:
        if self.trainer.world_size == 1:
            if not isinstance(tokens, Tensor):
                return tokens, 1
            return (tokens.item() if tokens.device.type == "mps" else tokens.double()), 1
        mesh = self.device_mesh
        group = mesh["data_parallel"].get_group() if mesh is not None else None
        # One rank may have a count and another a sum of weights; float64 holds both.
        total = torch.zeros((), dtype=torch.float64, device=self.trainer.strategy.root_device)
        total += tokens
        torch.distributed.all_reduce(total, group=group)
        return total, torch.distributed.get_world_size(group)


def multiply(gradients: Sequence[Tensor], factor: Tensor | float) -> None:
    """Multiply gradients in place. A factor on the device is read only for gradients that cannot take it from there."""
    whole = [local_shard(gradient) for gradient in gradients]
    if isinstance(factor, Tensor):
        device = factor.device
        if any(part.device != device or part.is_sparse or part.element_size() < 4 for part in whole):
            factor = factor.item()
    if not isinstance(factor, Tensor):
        if whole and factor != 1:
            torch._foreach_mul_(whole, factor)
        return
    for dtype in {part.dtype for part in whole}:
        torch._foreach_mul_([part for part in whole if part.dtype == dtype], factor.to(dtype))


@overload
def one_if_zero(count: Tensor) -> Tensor: ...


@overload
def one_if_zero(count: Tensor | float) -> Tensor | float: ...


def one_if_zero(count: Tensor | float) -> Tensor | float:
    """``count``, or 1 where it is 0, to divide by. A sum of weights may be below 1."""
    return count.masked_fill(count == 0, 1) if isinstance(count, Tensor) else count or 1
