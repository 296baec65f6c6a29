"""First values from the gradient (``init="gradient"``) of the first training batches, as training starts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_lora.batch.noise.sample_source import unsupported_strategy
from lightning_lora.batch.trial_step import observed, on_device, training_loss
from lightning_lora.errors import RankChangeError, first_five
from lightning_lora.lightning_private import attached_trainer
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.functional.sketched_svd import SketchedSVD
from lightning_lora.lora.gradient_start import has_started, start_along, waiting_layers, watched_gradients
from lightning_lora.mixin.first_batches import first_batches
from lightning_lora.sharding.collectives import largest_of_ranks

# With float16, gradients of outputs would vanish. Far below the scales at which first steps overflow.
_HALF_SCALE = 1024.0


def check_possible(module: LightningModule, config: LoRAConfig) -> None:
    """Refuse ``init="gradient"`` where its gradient could not be measured, before anything is adapted.

    Raises:
        ConfigError: If the gradient cannot be measured; the message says why.
    """
    trainer = attached_trainer(module)
    if config.init != "gradient" or trainer is None:
        return
    reason = unsupported_strategy(trainer.strategy)
    if reason is None and not module.automatic_optimization:
        reason = (
            f"{type(module).__name__} steps its optimizers itself: call lightning_lora.lora.gradient_start."
            f"gradient_init before fit."
        )
    if reason is not None:
        raise RankChangeError(
            f"init='gradient' measures a gradient before the first step. {reason} Or use another init."
        )


def start_from_first_batches(module: LightningModule, before_iterators: dict[str, Any] | None) -> None:
    """Start fresh adapters along the gradient of the first training batches of all ranks; once, not on resume.

    Nothing else changes: the order of the data, random numbers, buffers, attributes of the module and gradients. A
    collective.

    Args:
        before_iterators: See `first_batches`.

    Raises:
        ConfigError: If no layer has a gradient.
        GradientError: If a gradient is NaN or infinite.
    """
    trainer, layers = module.trainer, waiting_layers(module)
    if not layers or largest_of_ranks(trainer, torch.tensor(float(has_started(layers)))):
        return
    check_possible(module, next(iter(layers.values())).lora_spec.config)
    began = time.monotonic()
    batches = _as_many_on_all_ranks(
        trainer, first_batches(trainer, next(iter(layers.values())).lora_spec.config.init_batches, before_iterators)
    )
    with observed(trainer, module), watched_gradients(module, layers) as sketches:
        for batch in batches:
            _backward(trainer, module, on_device(trainer, batch))
    _add_up_ranks(trainer, sketches)
    without = start_along(module, layers, sketches)
    if without:
        rank_zero_warn(
            f"{len(without)} of {len(layers)} adapted layers received no gradient in the first {len(batches)} batches "
            f"and start by default: {first_five(without)}."
        )
    rank_zero_info(
        f"lora: {len(layers) - len(without)} layers start along the gradient of the first {len(batches)} batches "
        f"({time.monotonic() - began:.1f} s)"
    )


def _as_many_on_all_ranks(trainer: Trainer, batches: list[Any]) -> list[Any]:
    """The batches that every rank has: under FSDP2 ranks compute each of them together."""
    fewest = -int(largest_of_ranks(trainer, torch.tensor(-len(batches))))
    return batches[:fewest]


def _backward(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    # The module is called directly: the gradients that DDP would average are not used.
    loss = training_loss(trainer, module, batch)
    if isinstance(loss, Tensor):
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        module.backward(loss * _HALF_SCALE if has_scaler else loss)


def _add_up_ranks(trainer: Trainer, sketches: Mapping[str, SketchedSVD]) -> None:
    if trainer.world_size > 1:
        for sketch in sketches.values():
            for part in (sketch.range, sketch.core):
                torch.distributed.all_reduce(part)
