"""`ArmBank`: runs of several arms side by side in one process, on one frozen base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_lora.errors import StudySettingError, did_you_mean
from lightning_lora.study.bank.arm import ArmTurns
from lightning_lora.study.bank.exactness import ApartError, changes_base
from lightning_lora.study.bank.process_state import seed_all
from lightning_lora.study.bank.rows import Meeting
from lightning_lora.study.bank.shared_base import SharedBase
from lightning_lora.study.bank.turns import Seat, Turns

Mode = Literal["turns", "rows"]


@dataclass(frozen=True)
class ArmRun:
    """One arm: an ordinary run.

    Args:
        trainer: Its Trainer, with one device. Rates, schedules, clipping, checks, checkpoints and logs are its own.
        module: Its module, with ``lora``.
        data: Its data; None if the module has loaders itself.
        seed: Seeds python, numpy and torch for this arm, before its run begins; None: it goes on from their states.
        ckpt_path: The checkpoint to continue from.
    """

    trainer: Trainer
    module: LightningModule
    data: LightningDataModule | None = None
    seed: int | None = None
    ckpt_path: str | Path | None = None


@dataclass(frozen=True)
class Arm:
    """What a function of `ArmBank.run` needs.

    Args:
        seconds: Gives the seconds for which this arm had the process, without those of other arms.
    """

    callback: Callback
    seconds: Callable[[], float]


class ArmBank:
    """Trains LoRA arms side by side in one process: one frozen base in memory, everything else apart.

    Each arm is a run of its own Trainer, which waits while others have their turn. Modes:

    - ``turns``: one optimizer step of one arm after the other. Losses and weights are those of separate runs, bit for
      bit, with any module. Only one arm holds activations at a time.
    - ``rows``: the rows of all arms go through the base in one batch; each arm computes its own loss, clips its own
      gradients and has its own checks. Equal to separate runs up to rounding. A first pass is compared with those of
      the arms alone: where it differs, as with dropout or batch normalisation, arms take turns, and `why_turns` says
      why.

    An arm that fails, by NaN for instance, ends alone. Arms of which one changes frozen weights in training, as a
    teacher that follows its student does, all fail with an `ApartError`: they must be trained apart.

    Args:
        mode: How arms share the process.

    Example::

        bank = ArmBank("turns")
        bank.fit({"rank 1": ArmRun(Trainer(...), Mine(rank=1), data, seed=0), "rank 8": ArmRun(...)})
    """

    def __init__(self, mode: Mode = "turns") -> None:
        if mode not in get_args(Mode):
            raise StudySettingError(f"arms side by side take 'turns' or share 'rows', got {mode!r}{_hint(mode)}")
        self.mode: Mode = mode
        self._meeting = Meeting() if mode == "rows" else None

    @property
    def why_turns(self) -> str:
        """Why arms that were to share rows took turns; "" if they shared rows, or were to take turns anyway."""
        return "" if self._meeting is None else self._meeting.why_not

    @property
    def shared_passes(self) -> tuple[int, int]:
        """Number of passes of several arms, and of passes of one arm whose batch could not be joined with others."""
        return (0, 0) if self._meeting is None else (self._meeting.num_joint, self._meeting.num_alone)

    @property
    def remark(self) -> str:
        """What a user should know after the arms were to share rows; "" if they did, or were to take turns anyway."""
        joint, alone = self.shared_passes
        if self.why_turns:
            return f"arms take turns, as they cannot share batches: {self.why_turns}"
        if alone > joint:
            reason = self._meeting.last_reason if self._meeting is not None else ""
            return f"arms shared {joint} batches, and took turns for {alone}: {reason}"
        return ""

    def fit(self, runs: Mapping[str, ArmRun]) -> dict[str, Exception]:
        """Train all arms.

        Returns:
            Name to error of the arms that failed.
        """
        found = self.run({name: _fit(run) for name, run in runs.items()})
        return {name: result for name, result in found.items() if isinstance(result, Exception)}

    def run(self, arms: Mapping[str, Callable[[Arm], Any]]) -> dict[str, Any]:
        """Run functions in turns, each of which trains an arm by a Trainer with the callback that it is given.

        Args:
            arms: Name to function.

        Returns:
            Name to what the function returned, or to the exception that it raised.

        Raises:
            SystemExit: If the process was told to stop; each arm has saved its state, if it has `GracefulStop`.
        """
        base = SharedBase()

        def function(train: Callable[[Arm], Any]) -> Callable[[Seat], Any]:
            return lambda seat: train(Arm(ArmTurns(seat, base, self._meeting), seat.seconds))

        seats = Turns().run({name: function(train) for name, train in arms.items()})
        if changed := base.changed():
            return {seat.name: ApartError(changes_base(changed)) for seat in seats}
        return {seat.name: seat.result if seat.error is None else seat.error for seat in seats}


def _fit(run: ArmRun) -> Callable[[Arm], None]:
    def fit(arm: Arm) -> None:
        if run.seed is not None:
            seed_all(run.seed)
        callbacks: list[Callback] = [*run.trainer.callbacks, arm.callback]  # pyright: ignore[reportAttributeAccessIssue]
        run.trainer.callbacks = callbacks  # pyright: ignore[reportAttributeAccessIssue]
        path = run.ckpt_path
        run.trainer.fit(run.module, datamodule=run.data, ckpt_path=path, weights_only=True if path else None)

    return fit


def _hint(mode: object) -> str:
    return did_you_mean(str(mode), get_args(Mode))
