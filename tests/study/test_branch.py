"""The learning rate and second decay of a branch, and the rows it trains on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lora.batch.accumulation import fit_to_batch
from lightning_lora.study.batch_branches import BatchBranches
from lightning_lora.study.branch import BranchPoint
from lightning_lora.study.row_order import next_rows
from lightning_lora.study.snapshot import copy_module
from tests.study.student import Student, loader
from tests.support import toys

pytestmark = toys.expected_warnings


def test_the_largest_batch_is_not_blamed_for_a_second_decay_below_the_first() -> None:
    def fitted(ratio: float) -> tuple[float, float]:
        group = {"lr": 1.0, "betas": (0.9, 0.95)}
        fit_to_batch(group, 1.0, ratio)
        return group["lr"], group["betas"][1]

    assert fitted(0.25) == (0.5, 0.95**0.25)
    assert fitted(4) == (2.0, 0.95)


def test_the_rate_is_constant_and_cools_down_in_the_last_fifth() -> None:
    seen: list[float] = []

    class Watched(Student):
        def optimizer_step(self, *arguments: Any, **options: Any) -> None:
            super().optimizer_step(*arguments, **options)
            seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    point = BranchPoint(Watched(), None, loader(320, 0), 32, rate_factors=[0.5])
    point.losses_after(range(320), 32, 4.0, (loader(4, 5), range(4)))
    assert seen == pytest.approx([6e-3] * 8 + [4e-3, 2e-3])


def test_with_fresh_moments_each_group_goes_on_at_its_own_present_rate() -> None:
    seen: list[list[float]] = []

    class TwoGroups(Student):
        def configure_optimizers(self) -> Any:
            weights = [p for p in self.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.1}], lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 1.0])]

        def optimizer_step(self, *arguments: Any, **options: Any) -> None:
            super().optimizer_step(*arguments, **options)
            seen.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])

    state = {"param_groups": [{"lr": 0.005, "initial_lr": 0.01}, {"lr": 0.02, "initial_lr": 0.1}]}
    point = BranchPoint(TwoGroups(), state, loader(320, 0), 32).with_fresh_moments(TwoGroups())
    point.losses_after(range(320), 32, 1.0, (loader(4, 5), range(4)))
    assert seen[0] == pytest.approx([0.005, 0.02])


def test_each_branch_has_the_rate_of_its_batch() -> None:
    seen: list[float] = []

    class Watched(Student):
        def optimizer_step(self, *arguments: Any, **options: Any) -> None:
            super().optimizer_step(*arguments, **options)
            if self.trainer.global_step == 1:
                seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    point = BranchPoint(Watched(), None, loader(512, 0), 128)
    BatchBranches(32, (8, 32, 128), 512).train(point, range(512), (loader(4, 5), range(4)))
    assert seen == pytest.approx([3e-3, 6e-3, 12e-3])


def test_a_copy_has_a_teacher_of_its_own_and_shares_other_frozen_weights() -> None:
    class Mean(toys.Toy):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    module = Mean()
    module.configure_model()
    before = toys.snapshot(module)
    other: Any = copy_module(module)
    for parameter in other.teacher.parameters():
        parameter.data.add_(1)
    assert toys.same(toys.snapshot(module), before)
    assert other.net.first.weight.data_ptr() == module.net.first.weight.data_ptr()


def test_the_next_rows_are_those_of_the_sampler_and_used_ones_come_last() -> None:
    data = TensorDataset(torch.arange(12))
    shuffled = DistributedSampler(data, num_replicas=1, rank=0, seed=5)
    shuffled.set_epoch(2)
    order = list(shuffled)
    shuffled.set_epoch(0)
    assert next_rows(DataLoader(data, 4, sampler=shuffled), epoch=2, num_batches=1) == [*order[4:], *order[:4]]
    assert shuffled.epoch == 0
    assert next_rows(DataLoader(data, 4), num_batches=2) == [8, 9, 10, 11, *range(8)]
    state = torch.get_rng_state()
    assert sorted(next_rows(DataLoader(data, 4, shuffle=True))) == list(range(12))
    assert torch.equal(state, torch.get_rng_state())
