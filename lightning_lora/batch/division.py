"""How the rows of an optimizer step are divided: among ranks, and into micro-batches one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_lora.effective_batch import EffectiveBatch
from lightning_lora.errors import ConfigError


def divide(rows: int, ranks: int, at_once: int) -> EffectiveBatch:
    """A step of ``rows`` on ``ranks`` that take ``at_once`` rows at a time, or their whole share if it is less.

    Raises:
        ConfigError: If that cannot be; it names the nearest that can.
    """
    share, rest = divmod(rows, ranks)
    if not share:
        raise ConfigError(
            f"target_batch_size={rows} is less than a row for each of {ranks} devices: give {ranks}, or fewer devices."
        )
    if rest:
        raise ConfigError(
            f"target_batch_size={rows} cannot be shared by {ranks} devices: the nearest that can are "
            f"{_multiples(rows, ranks)}."
        )
    micro_batch = min(at_once, share)
    if share % micro_batch:
        nearest = sorted(divisors(share), key=lambda divisor: abs(divisor - at_once))[:2]
        raise ConfigError(
            f"target_batch_size={rows} is no multiple of {_rows_on(at_once, ranks)}: the nearest that are one are "
            f"{_multiples(rows, at_once * ranks)}; or keep it with a batch_size of {' or '.join(map(str, nearest))}."
        )
    return EffectiveBatch(micro_batch, share // micro_batch, ranks)


def divisors(number: int) -> Iterator[int]:
    """From the largest to 1."""
    return (divisor for divisor in range(number, 0, -1) if number % divisor == 0)


def refuse_two_masters(trainer: Trainer, module: LightningModule, name: str) -> None:
    """Accumulation has one master.

    Raises:
        ConfigError: If ``name`` would not be the only one.
    """
    if not module.automatic_optimization:
        raise ConfigError(f"with manual optimization the module decides when to step: drop {name}.")
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(
            f"GradientAccumulationScheduler sets accumulation in every epoch, and {name} too: keep one of the two."
        )


def _rows_on(rows: int, ranks: int) -> str:
    return f"{rows} rows x {ranks} {'device' if ranks == 1 else 'devices'}"


def _multiples(number: int, of: int) -> str:
    below = number // of * of
    return f"{below} and {below + of}" if below else f"{of} and {2 * of}"
