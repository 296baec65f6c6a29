"""How often a batch probe errs where the answer is known, for both rules of Adam's second decay.

    python -m benchmarks.batch_probe --seeds 20

A student with adapters learns a rank-8 linear teacher from noisy rows. From snapshots after 4,096 rows, 32 to a step,
branches of 2,048 rows: four and sixteen times the batch, and the same batch on other rows. Prints how many were called
worse, and by how many stated standard errors the last one differed.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig, LoRAMixin
from lightning_lora.study import branch
from lightning_lora.study.batch_branches import BatchBranches
from lightning_lora.study.branch import BranchPoint
from lightning_lora.study.comparison import Comparison, compared

WIDTH, RANK = 48, 8
BRANCHES = BatchBranches(32, (32, 128, 512), 2048)


class Student(LoRAMixin):
    """A linear layer that starts at zero."""

    lora = LoRAConfig(rank=2 * RANK, targets=["layer"])

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.zeros_(self.layer.weight)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.predict_step(batch, batch_idx)["loss"].mean()

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        return {"loss": 0.5 * (self.layer(x) - y).square().sum(1)}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lora_parameter_groups(6e-4), betas=(0.9, 0.95))


def rows(count: int, seed: int) -> DataLoader[Any]:
    """Noisy rows of one teacher, which is the same for every seed."""
    generator = torch.Generator().manual_seed(99)
    teacher = torch.randn(WIDTH, RANK, generator=generator) @ torch.randn(RANK, WIDTH, generator=generator)
    teacher *= 3 / teacher.norm()
    generator.manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator)
    return DataLoader(TensorDataset(x, x @ teacher.T + 0.5 * torch.randn(count, WIDTH, generator=generator)), 32)


def trial(seed: int) -> tuple[Comparison, Comparison, Comparison]:
    """Four times, sixteen times and once the batch, each against the batch of the run."""
    torch.manual_seed(seed)
    student = Student()
    with tempfile.TemporaryDirectory() as folder:
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "default_root_dir": folder}
        trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, **quiet)
        trainer.fit(student, rows(4096, 1000 + seed))
    point = BranchPoint(student, trainer.optimizers[0].state_dict(), rows(4096, seed), micro_batch=512)
    held_out = rows(256, 7000 + seed), range(256)
    losses = BRANCHES.train(point, range(4096), held_out)
    four, sixteen, _ = compared(losses)
    others = point.losses_after(range(2048, 4096), 32, 1.0, held_out)
    return four, sixteen, Comparison.of(32, 32, others[None] - losses[32])


def scaled_both_ways(group: dict[str, Any], before: float, after: float) -> None:
    """The other rule: ``beta2 ** ratio`` for larger batches too."""
    group["lr"] *= (after / before) ** 0.5
    group["betas"] = (group["betas"][0], group["betas"][1] ** (after / before))


def row(rule: str, num_seeds: int) -> str:
    trials = [trial(seed) for seed in range(num_seeds)]
    worse = [sum(each[place].is_worse for each in trials) for place in range(3)]
    deviations = torch.tensor([same.difference / same.error for _, _, same in trials])
    cells = [rule, *(f"{count} of {num_seeds}" for count in worse), f"{deviations.std():.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    num_seeds = parser.parse_args().seeds
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| beta2 of larger batches | 4 x called worse | 16 x | same batch, other rows | standard errors apart, sd |")
    print("|---|---|---|---|---|")
    print(row("kept", num_seeds), flush=True)
    branch.fit_to_batch = scaled_both_ways
    print(row("beta2 ** ratio", num_seeds))


if __name__ == "__main__":
    main()
