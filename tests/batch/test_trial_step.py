"""A trial takes the longest rows and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_lora.batch.trial_step import longest_batch, row_size, untouched
from lightning_lora.checkpoints.random_state import random_state
from tests.support import toys
from tests.support.cramped import Cramped, Data, fit

pytestmark = toys.expected_warnings


def test_a_trial_takes_the_longest_rows_and_leaves_loader_and_numbers_alone(tmp_path: Path) -> None:
    sizes = [3, 9, 1, 7, 9, 2]
    rows: Any = [torch.ones(size) for size in sizes]
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(rows, 2, shuffle=True, generator=generator, collate_fn=list)

    class Look(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before = random_state(torch.device("cpu"), [generator])
            batch = longest_batch(trainer, loader, 3)
            assert [len(row) for row in batch] == [9, 9, 7]
            after = random_state(torch.device("cpu"), [generator])
            assert torch.equal(before["torch"], after["torch"])
            assert torch.equal(before["own"][0], after["own"][0])
            self.has_looked = True

    fit(tmp_path, None, Cramped(), callbacks=[look := Look()])
    assert look.has_looked


@pytest.mark.parametrize(
    ("row", "size"),
    [
        (torch.ones(2, 3), 6),
        ({"ids": [1, 2], "text": "abc"}, 5),
        ((torch.ones(4), 1), 5),
        (torch.ones(3).numpy(), 3),
    ],
)
def test_the_size_of_a_row_is_what_it_holds(row: Any, size: int) -> None:
    assert row_size(row) == size


def test_nothing_that_happens_in_a_trial_stays(tmp_path: Path) -> None:
    class Mess(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            module: Any = pl_module
            before = toys.snapshot(module)
            with untouched(trainer, module):
                module.seen = module.seen + 1
                module.up.lora_A.data += 1
                module.sizes += [3]
                module.num_calls, module.novel = 9, 9
                module.up.extra = 1
                torch.rand(1)
                module.training_step(next(iter(Data().train_dataloader())), 0).backward()
                trainer.optimizers[0].step()
            assert toys.same(before, toys.snapshot(module))
            assert all(p.grad is None for p in module.parameters())
            assert not trainer.optimizers[0].state
            assert (module.sizes, module.num_calls, module.drawn) == ([], 0, [])
            assert not hasattr(module, "novel")
            assert not hasattr(module.up, "extra")
            assert module._window_tokens is None
            self.is_done = True

    fit(tmp_path, None, Cramped(), callbacks=[mess := Mess()])
    assert mess.is_done
