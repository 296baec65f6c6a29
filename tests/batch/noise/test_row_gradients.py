"""A step of one micro-batch is measured by its rows, as autograd gives them row by row (V5)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig
from lightning_lora.batch.noise.noise_scale import signal_and_trace
from lightning_lora.batch.noise.row_gradients import RowGradients
from lightning_lora.callbacks import BatchSizeMonitor
from lightning_lora.files.events import read_events
from tests.batch.noise.row_modules import MODELS, Language, Own, squared_errors
from tests.support import tiny_models, toys
from tests.support.monitored import EveryStep, Samples, Tokens, fit

pytestmark = [*toys.expected_warnings, *toys.monitor_warnings]


class SquaresOfRows(Callback):
    """Keeps the square norms of the rows before the monitor turns them into a sample."""

    squares: Tensor

    def __init__(self, monitor: BatchSizeMonitor) -> None:
        self.monitor = monitor

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert self.monitor._meter is not None
        source = self.monitor._meter.source
        assert isinstance(source, RowGradients)
        (found,) = source._squares
        self.squares = found[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_each_row_of_a_transformer_has_the_gradient_that_autograd_gives_it_alone(
    kind: str, dropout: float, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    tokens = torch.randint(3, tiny_models.VOCAB, (8, 9), generator=torch.Generator().manual_seed(3))
    module, monitor = Language(kind, dtype, dropout), Samples()
    seen = SquaresOfRows(monitor)
    trainer = toys.trainer(tmp_path, callbacks=[seen, monitor])
    trainer.fit(module, DataLoader(TensorDataset(tokens), batch_size=8))
    trained = [p for p in module.parameters() if p.requires_grad]
    losses = module.row_losses(tokens)
    gradients = [torch.autograd.grad(loss, trained, retain_graph=True) for loss in losses]
    expected = torch.stack([torch.cat([part.flatten() for part in row]).square().sum() for row in gradients])
    # The step's own gradient is a mean, so a row adds an eighth of its own.
    assert torch.allclose(64 * seen.squares, expected.double(), rtol=tolerance, atol=0)
    (sample,) = monitor.samples
    assert (sample.num_rows, sample.num_micro_batches) == (8, 8)


@pytest.mark.parametrize("kind", MODELS)
def test_the_kept_start_of_pissa_adds_nothing_to_the_gradients_of_rows(kind: str, tmp_path: Path) -> None:
    tokens = torch.randint(3, tiny_models.VOCAB, (4, 6), generator=torch.Generator().manual_seed(3))
    module, monitor = Language(kind, torch.float64, 0.0), Samples()
    module.lora = LoRAConfig(rank=3, init="pissa")
    seen = SquaresOfRows(monitor)
    toys.trainer(tmp_path, callbacks=[seen, monitor]).fit(module, DataLoader(TensorDataset(tokens), batch_size=4))
    trained = [p for p in module.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, trained, retain_graph=True) for loss in module.row_losses(tokens)]
    expected = torch.stack([torch.cat([part.flatten() for part in row]).square().sum() for row in gradients])
    assert torch.allclose(16 * seen.squares, expected.double(), rtol=1e-9, atol=0)


def by_hand(module: Any, batch: list[Tensor], row_losses: Callable[[Any, list[Tensor]], Tensor]) -> tuple[float, float]:
    """Signal and trace of one step, from the gradient of each row's own loss and of their mean."""
    trained = [p for p in module.parameters() if p.requires_grad]
    torch.manual_seed(7)
    losses = row_losses(module, batch)
    rows = [torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True) for loss in losses]
    gradients = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()
    signal, trace = signal_and_trace(gradients.square().sum(1), gradients.mean(0).square().sum(), 1)
    return float(signal), float(trace)


class Twice(nn.Module):
    """Its middle layer is called twice, and a third one holds the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.shares = nn.Linear(6, 6)
        self.shares.weight = self.middle.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.shares(torch.tanh(self.middle(torch.tanh(self.middle(self.first(x))))))))


class Halving(nn.Linear):
    """Overrides ``forward``, so that its update is not fused and its dropout is torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class InPlace(nn.Module):
    """Changes the outputs of its layers in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += x
        return self.last(y.mul_(2).tanh_())


NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "called twice and tied": (Twice, {"tied_weights": "both"}),
    "written out, with dropout": (lambda: nn.Sequential(Halving(4, 6), nn.Tanh(), Halving(6, 2)), {"dropout": 0.3}),
    "changed in place": (InPlace, {}),
    "several axes": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 1, 2)), nn.Linear(2, 3), nn.Linear(3, 1), nn.Flatten(1, 3), nn.Flatten(0, 0)
        ),
        {"rank": 1},
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_a_step_of_one_micro_batch_is_what_autograd_gives_by_hand(name: str, tmp_path: Path) -> None:
    net, settings = NETS[name]
    module = Own(net, **settings)
    (sample,) = fit(tmp_path, 8, 8, 1, module).samples
    signal, trace = by_hand(module, next(iter(toys.loader(8, 8))), squared_errors)
    assert sample.signal == pytest.approx(signal, rel=1e-12)
    assert sample.trace == pytest.approx(trace, rel=1e-12)
    assert (sample.num_rows, sample.num_micro_batches) == (8, 8)


def test_a_loss_summed_over_tokens_gives_each_row_its_sum_over_the_mean_number_of_tokens(tmp_path: Path) -> None:
    (sample,) = fit(tmp_path, 8, 8, 1, Tokens()).samples
    module: Any = Tokens()
    module.configure_model()

    def losses(module: Any, batch: list[Tensor]) -> Tensor:
        mask = batch[0] > 0
        return squared_errors(module, batch) * 2 * mask.sum(1) / mask.sum() * 8

    signal, trace = by_hand(module, next(iter(toys.loader(8, 8))), losses)
    assert sample.signal == pytest.approx(signal, rel=1e-12)
    assert sample.trace == pytest.approx(trace, rel=1e-12)


def test_two_micro_batches_of_one_row_need_no_rows_by_themselves(tmp_path: Path) -> None:
    (by_rows,) = fit(tmp_path, 2, 2, 1).samples
    (by_micro_batches,) = fit(tmp_path, 2, 1, 2).samples
    assert by_rows[:2] == pytest.approx(by_micro_batches[:2], rel=1e-12)


class AllMetrics(EveryStep):
    measures_adam, frozen_weights_every = True, 1


def test_measuring_rows_changes_no_weight_and_draws_no_random_number(tmp_path: Path) -> None:
    """F24 in all metrics, with dropout, which would show an additional draw."""
    finals, states = [], []
    for callbacks in ([AllMetrics()], []):
        torch.manual_seed(0)
        module = Language("llama", torch.float32, 0.25)
        tokens = torch.randint(3, tiny_models.VOCAB, (24, 9), generator=torch.Generator().manual_seed(3))
        module.configure_optimizers = lambda module=module: torch.optim.AdamW(  # pyright: ignore
            [p for p in module.parameters() if p.requires_grad], lr=0.01, betas=(0.9, 0.5)
        )
        toys.trainer(tmp_path, callbacks=callbacks).fit(module, DataLoader(TensorDataset(tokens), batch_size=4))
        finals.append(toys.snapshot(module))
        states.append(torch.get_rng_state())
    assert toys.same(*finals)
    assert torch.equal(*states)
    assert {"gns/adam", "gns/weight"} <= list(read_events(tmp_path))[-1].keys()
