"""A step of one micro-batch is measured by its rows, as autograd gives them row by row (V5), or refused (F23)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig, inject_lora
from lightning_lora.batch.noise.noise_scale import signal_and_trace
from lightning_lora.batch.noise.row_layers import row_layers
from lightning_lora.batch.noise.row_samples import RowGradients
from lightning_lora.callbacks import BatchSizeMonitor
from lightning_lora.errors import ConfigError
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.mixin.lora_mixin import LoRAMixin
from tests.callbacks.test_batch_size_monitor import Double, Samples, Tokens, fit
from tests.support import tiny_models, toys

pytestmark = [*toys.expected_warnings, *toys.monitor_warnings]

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_models.llama(attn_implementation="eager"),
    "gpt2": lambda: tiny_models.gpt2(attn_implementation="eager"),
}


class Language(LoRAMixin, LightningModule):
    """A transformer of two blocks; the loss of a batch is the mean of the losses of its rows."""

    def __init__(self, kind: str, dtype: torch.dtype, dropout: float) -> None:
        super().__init__()
        self.kind, self.dtype_wanted = kind, dtype
        self.lora = LoRAConfig(rank=3, dropout=dropout)

    def configure_model(self) -> None:
        self.net = MODELS[self.kind]().train()
        self.apply_lora()
        tiny_models.wake(self.net)
        self.net.to(self.dtype_wanted)

    def row_losses(self, tokens: Tensor) -> Tensor:
        torch.manual_seed(7)
        scores = self.net(tokens).logits[:, :-1]
        return F.cross_entropy(scores.mT, tokens[:, 1:], reduction="none").mean(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.row_losses(batch[0]).mean()

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


class SquaresOfRows(Callback):
    """What the monitor is about to make a sample of."""

    squares: Tensor

    def __init__(self, monitor: BatchSizeMonitor) -> None:
        self.monitor = monitor

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert self.monitor._meter is not None
        source = self.monitor._meter.source
        assert isinstance(source, RowGradients)
        (found,) = source._squares
        self.squares = found[0]


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


def by_hand(module: Any, batch: list[Tensor], row_losses: Callable[[Any, list[Tensor]], Tensor]) -> tuple[float, float]:
    """Signal and trace of one step, from the gradient of each row's own loss and of their mean."""
    trained = [p for p in module.parameters() if p.requires_grad]
    torch.manual_seed(7)
    losses = row_losses(module, batch)
    rows = [torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True) for loss in losses]
    gradients = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()
    signal, trace = signal_and_trace(gradients.square().sum(1), gradients.mean(0).square().sum(), 1)
    return float(signal), float(trace)


def squared_errors(module: Any, batch: list[Tensor]) -> Tensor:
    x, y = (part.double() for part in batch)
    return (module.net(x) - y).square().flatten(1).mean(1)


class Own(Double):
    """Double, with a network of the test's; the first step is measured at weights by hand."""

    def __init__(self, net: Callable[[], nn.Module], **settings: Any) -> None:
        super().__init__()
        self.lora = LoRAConfig(**{"rank": 2, "targets": "all"} | settings)
        self.make = net

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.net = self.make()
        self.apply_lora()
        tiny_models.wake(self.net, size=0.5)
        self.double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        torch.manual_seed(7)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


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
    """Computes in its own way, so its update is written out and draws its dropout from torch."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class InPlace(nn.Module):
    """What its layers return is changed afterwards."""

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


class Bypassed(nn.Module):
    """The update of its first layer takes effect past the layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        update: Any = self.first
        return self.last(self.first(x) + F.linear(x, update.weight_delta()))


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Any = checkpoint(lambda x: torch.tanh(self.first(x)), x, use_reentrant=False)
        return self.last(y)


class Flat(nn.Module):
    """Rows and positions are one axis before its layers see them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.reshape(-1, 2)))).reshape(len(x), 2)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (
            Bypassed,
            r"the gradients of the rows do not add up to that of net\.first\.lora_[AB]: it is used in a way",
        ),
        (Recomputed, r"net\.first is computed again in the backward pass \(activation checkpointing\)"),
        (Flat, r"net\.\w+ is given 16 rows where the batch has 8: the rows cannot be told apart"),
    ],
)
def test_rows_that_cannot_be_told_apart_end_the_measurement_and_not_the_run(
    net: type[nn.Module], reason: str, tmp_path: Path
) -> None:
    module = Own(net, rank=1)
    with pytest.warns(UserWarning, match=f"monitor measures nothing: it failed at step 0: {reason}"):
        monitor = fit(tmp_path, 24, 8, 1, module)
    assert not monitor.samples
    assert all(not layer._forward_hooks and layer.lora_watcher is None for layer in lora_layers(module).values())


class Parted(nn.Module):
    """A layer of a kind that has no gradient by rows, and a linear one."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other, self.head = other, nn.Linear(4, 2)


def compiled() -> nn.Module:
    net = nn.Linear(4, 4)
    net.compile(backend="eager")
    return net


def checkpointing() -> nn.Module:
    net = tiny_models.llama()
    # The newer name first: transformers warns of the older one.
    newer = getattr(net, "activation_checkpointing_enable", None)
    (net.gradient_checkpointing_enable if newer is None else newer)()
    return net.train()


@pytest.mark.parametrize(
    ("other", "settings", "reason"),
    [
        (lambda: nn.Embedding(8, 4), {"targets": ["other"]}, r"other\.lora_A has no gradient by rows"),
        (lambda: nn.Conv1d(4, 4, 2), {"targets": ["other"]}, r"other\.lora_A has no gradient by rows"),
        (lambda: nn.LSTM(4, 4, batch_first=True), {"targets": ["other"]}, r"other\.weight_ih_l0_lora_A has no"),
        (lambda: nn.Linear(4, 4), {"targets": ["other"], "trainable": ["head"]}, r"head\.weight has no gradient"),
        (
            lambda: nn.MultiheadAttention(4, 2, batch_first=True),
            {"targets": ["other.out_proj"]},
            r"other\.out_proj\.lora_A has no gradient by rows",
        ),
        (lambda: nn.GRU(4, 4), {"targets": ["head"]}, r"other has batch_first=False, so rows are not the first"),
        (compiled, {"targets": ["head"]}, r"other is compiled, which passes hooks over"),
        (checkpointing, {"targets": ["head"]}, r"other\.model\S* computes again in the backward pass"),
    ],
)
def test_what_has_no_gradient_by_rows_is_named(
    other: Callable[[], nn.Module], settings: dict[str, Any], reason: str
) -> None:
    module = Parted(other())
    inject_lora(module, LoRAConfig(rank=1, **settings))
    with pytest.raises(ConfigError, match=reason):
        row_layers(module, [p for p in module.parameters() if p.requires_grad])


def test_the_way_out_is_told_at_the_start(tmp_path: Path) -> None:
    """A head trained in full, in a run of one micro-batch a step."""
    module = Own(lambda: toys.Net(), targets=["first"], trainable=["second"])
    with pytest.warns(
        UserWarning,
        match=r"a step is one micro-batch, and its rows cannot be compared: net\.second\.weight has no gradient by "
        r"rows: .* Set accumulate_grad_batches=2 with half the batch",
    ):
        assert not fit(tmp_path, 8, 4, 1, module).samples


def test_measuring_rows_changes_no_weight_and_draws_no_random_number(tmp_path: Path) -> None:
    """F24 in all spaces, with dropout, which would show another number of draws."""
    finals, states = [], []
    monitor = BatchSizeMonitor(warmup_steps=0, spaces=("adapter", "adam"), weight_space_every=1)
    for callbacks in ([monitor], []):
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
    assert set(monitor._spaces.estimates()) == {"adam", "weight"}
