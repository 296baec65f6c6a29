"""Divides the rows of an optimizer step among ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_lora.effective_batch import EffectiveBatch
from lightning_lora.errors import AccumulationError
from lightning_lora.trainer_access import found


def divide_rows(rows: int, num_ranks: int, micro_batch: int) -> EffectiveBatch:
    """Divide ``rows`` among ranks and micro-batches. A rank whose share is less than ``micro_batch`` takes it at once.

    Raises:
        ConfigError: If the rows cannot be divided; the message names the nearest rows that can.
    """
    share, rest = divmod(rows, num_ranks)
    if not share:
        raise AccumulationError(
            f"target_batch_size={rows} cannot give each of {num_ranks} devices a row: use at least {num_ranks}, or "
            f"fewer devices."
        )
    if rest:
        raise AccumulationError(
            f"target_batch_size={rows} cannot be divided among {num_ranks} devices: the nearest that can are "
            f"{_nearest_multiples(rows, num_ranks)}."
        )
    fitting = min(micro_batch, share)
    if share % fitting:
        nearest = sorted(divisors(share), key=lambda divisor: abs(divisor - micro_batch))[:2]
        raise AccumulationError(
            f"target_batch_size={rows} is not a multiple of {micro_batch} rows x {num_ranks} "
            f"{'device' if num_ranks == 1 else 'devices'}: the nearest multiples are "
            f"{_nearest_multiples(rows, micro_batch * num_ranks)}; or keep it with a batch_size of "
            f"{' or '.join(map(str, nearest))}."
        )
    return EffectiveBatch(fitting, share // fitting, num_ranks)


def divisors(number: int) -> Iterator[int]:
    """All divisors of ``number``, largest first."""
    return (divisor for divisor in range(number, 0, -1) if number % divisor == 0)


def check_may_set_accumulation(trainer: Trainer, module: LightningModule, name: str) -> None:
    """Check that nothing else sets ``accumulate_grad_batches`` or steps the optimizer.

    Raises:
        ConfigError: If optimization is manual, or a ``GradientAccumulationScheduler`` sets accumulation.
    """
    if not module.automatic_optimization:
        raise AccumulationError(f"with manual optimization the module decides when to step: drop {name}.")
    if found(trainer, GradientAccumulationScheduler) is not None:
        raise AccumulationError(
            f"GradientAccumulationScheduler and {name} both set accumulate_grad_batches: keep one of the two."
        )


def _nearest_multiples(number: int, of: int) -> str:
    below = number // of * of
    return f"{below} and {below + of}" if below else f"{of} and {2 * of}"
