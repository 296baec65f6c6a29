"""The callback by which a Trainer takes turns with those of other arms, on one base."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_lora.callbacks import GracefulStop
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.study.bank.exactness import ApartError, changes_base, why_apart
from lightning_lora.study.bank.rows import ArmRows, Meeting
from lightning_lora.study.bank.shared_base import SharedBase
from lightning_lora.study.bank.turns import Seat
from lightning_lora.tasks.pretrained import PretrainedTask
from lightning_lora.trainer_access import found

FIRST_BATCHES = 3
"""Batches before which the base is looked at, as most that change it do so in every step; the bank looks at the end."""


class ArmTurns(Callback):
    """Shares the base with other arms, and lets them train after each optimizer step, or in the same batches.

    Args:
        meeting: Where arms make one batch of theirs; None: they take turns only.
    """

    def __init__(self, seat: Seat, base: SharedBase, meeting: Meeting | None = None) -> None:
        self._seat = seat
        self._base = base
        self._meeting = meeting
        self._rows: ArmRows | None = None
        self._step = 0
        self._num_looks = FIRST_BATCHES

    def __deepcopy__(self, memo: Any) -> ArmTurns:
        return self  # a Trainer that is copied with its callbacks stays in its place

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the base be loaded once, and signals reach this arm."""
        if stage != "fit":
            return
        if reason := why_apart(trainer, pl_module):
            raise ApartError(reason)
        if isinstance(pl_module, PretrainedTask):
            pl_module.load_through = partial(self._load, trainer, pl_module)
        stop = found(trainer, GracefulStop)
        if stop is not None:
            stop.listens = False
            self._seat.stop = stop.ask

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Share what is frozen."""
        self._share(pl_module)
        if self._meeting is not None:
            # Here, as a module may be adapted in `configure_model`.
            root = pl_module._lora_module() if isinstance(pl_module, LoRAMixin) else pl_module
            self._rows = ArmRows(self._meeting, self._seat, pl_module, root)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step that the run begins with."""
        self._step = trainer.global_step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a batch; in the first ones, see whether an arm has changed what all share."""
        if self._num_looks and (name := self._base.changed()):
            raise ApartError(changes_base(name))
        self._num_looks = max(0, self._num_looks - 1)
        if self._rows is not None:
            self._rows.begin()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let other arms train after an optimizer step."""
        if self._rows is not None:
            self._rows.end()
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._seat.pass_turn()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the batches of the others."""
        if self._rows is not None:
            self._rows.leave()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Share again: at the end of a run the Trainer has moved the module to the CPU."""
        self._share(pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Share again, as before prediction."""
        if trainer.state.fn != "fit":
            self._share(pl_module)

    def _share(self, module: LightningModule) -> None:
        self._base.share(module)

    def _load(self, trainer: Trainer, task: PretrainedTask, load: Callable[[], nn.Module]) -> nn.Module:
        task.load_through = None
        key = type(task), task.model_name, task.loading_dtype, task.quantization, trainer.precision
        return self._base.load(key, load, trainer.strategy.root_device)
