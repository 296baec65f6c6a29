"""`TinyTask`, the pre-trained `TinyGPT` that learns a new task, and `TinyData`, the rows of the task."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_lora import LoRAConfig, LoRAMixin
from studies.modules.base import pretrained
from studies.modules.rows import Rows, Task, rows_of
from studies.modules.tiny_gpt import row_losses

BETAS, EPS = (0.9, 0.95), 1e-12
"""Of Adam in all arms. A larger eps would be felt by adapters first, whose gradients shrink with alpha / rank."""


class TinyTask(LoRAMixin):
    """A pre-trained small GPT, fine-tuned in full or by adapters, at a constant rate and without weight decay.

    Args:
        learning_rate: Of full fine-tuning; adapters train at ``lora.lr_multiplier`` times this rate.
        lora: Settings of the adapters; None for full fine-tuning.
        width: Of the network; a larger one needs a base of its own, which is trained at the first use.
        num_layers: Blocks.
        num_experts: Experts of a block, two of which each token uses; 0 for a dense MLP.
        base_steps: Steps of pre-training.
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        lora: LoRAConfig | None = None,
        width: int = 128,
        num_layers: int = 2,
        num_experts: int = 0,
        base_steps: int = 3000,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.lora = lora
        self.gpt = pretrained(width, num_layers, num_experts, base_steps)

    @override
    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
        """The mean loss of the rows; all rows of a task have the same number of supervised tokens."""
        return self.predict_step(batch, batch_idx)["loss"].mean()

    @override
    def validation_step(self, batch: Rows, batch_idx: int) -> None:
        """Log the loss for the curve."""
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch["labels"]))

    @override
    def predict_step(self, batch: Rows, batch_idx: int) -> dict[str, Tensor]:
        """The loss of each row, which a study compares."""
        loss, tokens = row_losses(self.gpt(batch["input_ids"]), batch["labels"])
        return {"loss": loss, "tokens": tokens}

    @override
    def configure_optimizers(self) -> Any:
        """Adam as in all arms; one group for adapters, or one for all weights."""
        groups = self.lora_parameter_groups(self.learning_rate)
        return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, weight_decay=0.0)


class TinyRows(Dataset[Any]):
    """Rows as a data set.

    Args:
        rows: What it holds.
        exposures: How often each row is in it.
    """

    def __init__(self, rows: Rows, exposures: int = 1) -> None:
        self.rows = rows
        self.count = len(rows["labels"])
        self.exposures = exposures

    def __len__(self) -> int:
        return self.count * self.exposures

    def __getitem__(self, place: int) -> Rows:
        return {name: tensor[place % self.count] for name, tensor in self.rows.items()}


class TinyData(LightningDataModule):
    """Training and held-out rows of a task; the order of the training rows follows the seed of the run.

    Facts are random, so nothing can be learnt of other facts: the held-out rows are the facts themselves, and the loss
    says how many of their bits are stored. The held-out rows of other tasks are drawn anew.

    Args:
        task: ``facts``, ``text`` or ``copy``.
        num_rows: Different training rows.
        exposures: How often each is trained on.
        batch_size: Rows in a batch.
        validation_rows: Held-out rows; not used for facts.
    """

    def __init__(
        self,
        task: Task = "facts",
        num_rows: int = 1000,
        exposures: int = 1,
        batch_size: int = 32,
        validation_rows: int = 512,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        train = rows_of(task, "new", num_rows, seed=1)
        self.train_rows = TinyRows(train, exposures)
        self.held_out = TinyRows(train if task == "facts" else rows_of(task, "new", validation_rows, seed=2))

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled by the global random numbers, which a study seeds alike in all arms."""
        return DataLoader(self.train_rows, self.batch_size, shuffle=True, drop_last=True)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """In order."""
        return DataLoader(self.held_out, 512)
