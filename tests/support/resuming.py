"""Runs that save a checkpoint at every place where they can be interrupted, and runs that resume from there.

``python -m tests.support.resuming`` prints what docs/use/resume.md counts.
"""

from __future__ import annotations

import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_lora import LoRAConfig
from lightning_lora.mixin.lora_mixin import LoRAMixin
from tests.support import toys

NUM_BATCHES = 7
"""Batches of an epoch, chosen so that accumulation windows of 3 end with a short one."""

NUM_EPOCHS = 3


class Dicey(toys.Plain):
    """Draws random numbers of every kind in training, and lets two schedulers lower its learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)
        self.norm = nn.BatchNorm1d(4)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.dropout(self.norm(x)))

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) * (1 + 0.1 * random.random() + 0.1 * float(numpy.random.rand()))
        self.log("train_loss", loss, on_step=True, on_epoch=False)
        return loss

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0)
        settings = {"scheduler": plateau, "monitor": "val_loss", "interval": "epoch"}
        return [optimizer], [{"scheduler": cosine, "interval": "step"}, settings]


class DiceyFull(LoRAMixin, Dicey):
    """`Dicey` with the mixin, fully trained."""

    lora = None


class DiceyLoRA(LoRAMixin, Dicey):
    """`Dicey` with adapters, which use dropout too."""

    lora = LoRAConfig(rank=2, dropout=0.2)


class Smooth(DiceyLoRA):
    """Asks for the number of steps while optimizers are set up, as cosine schedules do; Lightning then makes iterators.

    Args:
        dropout: Dropout probability of layers and adapters.
    """

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.lora = LoRAConfig(rank=2, dropout=dropout)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.lora_parameter_groups(0.005))
        num_steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]


@dataclass
class Outcome:
    """Losses that a run has logged, by step and batch, and its last checkpoint."""

    losses: list[tuple[int, int, float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    checkpoint: dict[str, Any] = field(default_factory=dict)


class Recorder(Callback):
    """Records the losses; with a ``folder``, saves a checkpoint there at every place, or at some ``places``."""

    def __init__(self, folder: Path | None = None, places: Container[str] | None = None) -> None:
        self.folder = folder
        self.places = places
        self.outcome = Outcome()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.outcome.losses.append((trainer.global_step, batch_idx, float(outputs["loss"])))
        self._save(trainer, f"batch-{trainer.current_epoch}-{batch_idx + 1}")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.outcome.validations.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))
        self._save(trainer, f"validation-{trainer.current_epoch}-{trainer.fit_loop.batch_idx + 1}")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, f"epoch-{trainer.current_epoch}")

    def _save(self, trainer: Trainer, name: str) -> None:
        if self.folder is not None and (self.places is None or name in self.places):
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")


def shuffled(num_batches: int = NUM_BATCHES, **options: Any) -> DataLoader[Any]:
    """A loader whose order is drawn from torch's global generator."""
    return DataLoader(toys.rows(2 * num_batches), batch_size=2, shuffle=True, **options)


def seed_all(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def run(
    make: Callable[[], LightningModule],
    folder: Path,
    ckpt_path: Path | None = None,
    loader: Callable[[], Any] = shuffled,
    is_validated: bool = True,
    seed: int = 99,
    is_first: bool = False,
    places: Container[str] | None = None,
    **options: Any,
) -> Outcome:
    """Train and record what happened.

    Args:
        make: Makes the module.
        folder: Folder of the checkpoints.
        ckpt_path: Checkpoint to resume from; None: a whole run, which saves at every place.
        loader: Makes the training loader.
        is_validated: Whether there is a validation loader.
        seed: Seed of a resumed run; a whole run starts with another one.
        is_first: Whether checkpoints are written before the other callbacks run, instead of after them.
        places: Where a whole run saves, if not at every place.
        options: Arguments of the Trainer.
    """
    seed_all(0 if ckpt_path is None else seed)
    recorder = Recorder(folder if ckpt_path is None else None, places)
    callbacks = [*options.pop("callbacks", ()), recorder][:: -1 if is_first else 1]
    settings: dict[str, Any] = {"max_epochs": NUM_EPOCHS, "callbacks": callbacks, "log_every_n_steps": 1}
    trainer = toys.trainer(folder, **(settings | options))
    validation: dict[str, Any] = {"val_dataloaders": toys.loader(4, seed=3)} if is_validated else {}
    trainer.fit(make(), loader(), **validation, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / "end" / "end.ckpt")
    recorder.outcome.checkpoint = torch.load(folder / "end" / "end.ckpt", weights_only=True)
    return recorder.outcome


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Places where two checkpoints are not equal bit for bit."""
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        return [line for key in one for line in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            line for i, pair in enumerate(zip(one, other, strict=True)) for line in differences(*pair, f"{path}/{i}")
        ]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [f"{path}: tensors differ"]
    return [] if one == other else [f"{path}: {one} != {other}"]


def unlike(whole: Outcome, resumed: Outcome) -> list[str]:
    """Differences between a resumed run and the uninterrupted one."""
    found = differences(whole.checkpoint, resumed.checkpoint)
    for kind in ("losses", "validations"):
        expected, logged = getattr(whole, kind), getattr(resumed, kind)
        if logged != expected[len(expected) - len(logged) :]:
            found.append(f"{kind}: {logged} is not the end of {expected}")
    return found


def check_exact(make: Callable[[], LightningModule], folder: Path, places: list[str], **options: Any) -> None:
    """Assert that runs resumed at ``places`` equal the uninterrupted run bit for bit."""
    whole = run(make, folder, places=places, **options)
    for place in places:
        found = unlike(whole, run(make, folder, folder / f"{place}.ckpt", **options))
        assert not found, f"{place}: {found[:5]}"


def _distance(whole: Outcome, resumed: Outcome) -> str:
    states = whole.checkpoint["state_dict"], resumed.checkpoint["state_dict"]
    largest = max(float((states[0][name].double() - states[1][name].double()).abs().max()) for name in states[0])
    count = len(whole.losses) - len(resumed.losses)
    same = sum(one == other for one, other in zip(whole.losses[count:], resumed.losses, strict=False))
    return f"{largest:.3g}, {same} of {len(resumed.losses)}" if unlike(whole, resumed) else "0 (bit-equal)"


PLACES = {
    "middle of an epoch": "batch-1-3",
    "middle of an accumulation window": "batch-1-4",
    "validation in the middle": "validation-1-3",
    "last batch of an epoch": "batch-1-7",
    "end of an epoch": "epoch-1",
}


def main() -> None:
    """Print a table of what Lightning alone and the mixin do at each place."""
    warnings.simplefilter("ignore")
    print("| saved at | stop | accumulate | Lightning alone | LoRAMixin, lora=None | LoRAMixin, LoRA |")
    print("|---|---|---:|---|---|---|")
    for limit in ({"max_epochs": NUM_EPOCHS}, {"max_epochs": -1, "max_steps": 19}):
        for accumulate in (1, 3):
            options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "val_check_interval": 3} | limit
            if "max_steps" in limit:
                options["max_steps"] = 19 if accumulate == 1 else 8
            rows: dict[str, list[str]] = {place: [] for place in PLACES}
            for make in (Dicey, DiceyFull, DiceyLoRA):
                with tempfile.TemporaryDirectory() as folder:
                    whole = run(make, Path(folder), **options)
                    for place, name in PLACES.items():
                        path = Path(folder) / f"{name}.ckpt"
                        try:
                            # As if the same script were run again, with the same seed.
                            resumed = run(make, Path(folder), path, seed=0, **options)
                            rows[place].append(_distance(whole, resumed))
                        except Exception as error:
                            rows[place].append(type(error).__name__)
            for place, cells in rows.items():
                stop = "max_steps" if "max_steps" in limit else "max_epochs"
                print(f"| {place} | {stop} | {accumulate} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
