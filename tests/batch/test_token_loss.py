"""Every supervised token of an optimizer step counts the same, however the step is cut into micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora.batch.token_loss import TokenWeightedLoss, multiply
from tests.support import toys
from tests.support.toys import Net

pytestmark = toys.expected_warnings

COUNTS = (1, 5, 3, 6, 2, 2, 6, 4)
"""Supervised tokens of each row, out of 6."""


class Weighted(TokenWeightedLoss):
    """Squared error per token; remembers the gradient of every step as the optimizer gets it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.gradients: list[Tensor] = []

    def losses(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        x, y, mask = batch
        return ((self.net(x) - y).square().mean(-1) * mask).sum(), mask.sum()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.token_loss(*self.losses(batch))

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]))

    def configure_optimizers(self) -> Any:
        # A rate this small leaves the weights unchanged, so every step has the gradient of the same function.
        return torch.optim.SGD(self.parameters(), lr=1e-12)


class MeanOfMeans(Weighted):
    """Averages means, as Lightning does by itself."""

    on_before_optimizer_step = LightningModule.on_before_optimizer_step

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss, count = self.losses(batch)
        return loss / count.clamp(min=1)


def token_loader(batch_size: int, counts: tuple[int, ...] = COUNTS) -> Any:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, 6, width, generator=generator)[: len(counts)] for width in (4, 2))
    mask = (torch.arange(6) < torch.tensor(counts)[:, None]).float()
    return DataLoader(TensorDataset(x, y, mask), batch_size=batch_size)


def gradients(folder: Path, data: Any, kind: type[Weighted] = Weighted, **options: Any) -> list[Tensor]:
    module = kind()
    toys.trainer(folder, **options).fit(module, data)
    return module.gradients


def test_four_micro_batches_of_two_rows_are_one_batch_of_eight(tmp_path: Path) -> None:
    (whole,) = gradients(tmp_path, token_loader(8))
    (accumulated,) = gradients(tmp_path, token_loader(2), accumulate_grad_batches=4)
    torch.testing.assert_close(accumulated, whole, rtol=1e-6, atol=1e-6)
    (plain,) = gradients(tmp_path, token_loader(8), MeanOfMeans)
    torch.testing.assert_close(whole, plain, rtol=1e-6, atol=1e-6)


def test_lightnings_own_mean_of_means_is_not(tmp_path: Path) -> None:
    (whole,) = gradients(tmp_path, token_loader(8), MeanOfMeans)
    (accumulated,) = gradients(tmp_path, token_loader(2), MeanOfMeans, accumulate_grad_batches=4)
    assert (whole - accumulated).norm() > 0.05 * whole.norm()


def test_short_last_window_is_a_batch_of_its_own(tmp_path: Path) -> None:
    first, last = gradients(tmp_path, token_loader(2), accumulate_grad_batches=3)
    (six,) = gradients(tmp_path, token_loader(6, COUNTS[:6]))
    assert not torch.allclose(first, last)
    torch.testing.assert_close(first, six, rtol=1e-6, atol=1e-6)
    module = Weighted()
    batch = [tensor[6:] for tensor in token_loader(8).dataset.tensors]
    loss, count = module.losses(batch)
    (loss / count).backward()
    two = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    torch.testing.assert_close(last, two, rtol=1e-6, atol=1e-6)


def test_windows_of_two_epochs_do_not_mix(tmp_path: Path) -> None:
    found = gradients(tmp_path, token_loader(2), accumulate_grad_batches=3, max_epochs=2)
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-6, atol=1e-6)


def test_clipping_sees_the_weighted_gradient(tmp_path: Path) -> None:
    (whole,) = gradients(tmp_path, token_loader(8))
    (clipped,) = gradients(tmp_path, token_loader(2), accumulate_grad_batches=4, gradient_clip_val=0.25)
    assert whole.norm() > 0.25
    torch.testing.assert_close(clipped, whole * (0.25 / whole.norm()), rtol=1e-5, atol=1e-6)
    (loose,) = gradients(tmp_path, token_loader(2), accumulate_grad_batches=4, gradient_clip_val=100.0)
    torch.testing.assert_close(loose, whole, rtol=1e-6, atol=1e-6)


def test_micro_batch_without_supervised_tokens_adds_nothing(tmp_path: Path) -> None:
    (whole,) = gradients(tmp_path, token_loader(4, (3, 5, 1, 6)))
    (masked,) = gradients(tmp_path, token_loader(1, (3, 5, 1, 6)), accumulate_grad_batches=4)
    torch.testing.assert_close(masked, whole, rtol=1e-6, atol=1e-6)
    (padded,) = gradients(tmp_path, token_loader(2, (3, 5, 0, 0)), accumulate_grad_batches=2)
    (alone,) = gradients(tmp_path, token_loader(4, (3, 5, 0, 0)))
    torch.testing.assert_close(padded, alone, rtol=1e-6, atol=1e-6)


def test_step_without_any_supervised_token_has_gradient_zero(tmp_path: Path) -> None:
    (none,) = gradients(tmp_path, token_loader(4, (0, 0, 0, 0)))
    assert none.eq(0).all()


def test_bfloat16_autocast_divides_the_same_way(tmp_path: Path) -> None:
    (whole,) = gradients(tmp_path, token_loader(8), precision="bf16-mixed")
    (accumulated,) = gradients(tmp_path, token_loader(2), accumulate_grad_batches=4, precision="bf16-mixed")
    torch.testing.assert_close(accumulated, whole, rtol=0.05, atol=0.01)


def test_a_window_left_open_by_an_exception_does_not_leak_into_the_next_run(tmp_path: Path) -> None:
    class Interrupted(Weighted):
        broken = True

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.broken:
                raise ValueError("out of luck")
            return loss

    module = Interrupted()
    with pytest.raises(ValueError, match="out of luck"):
        toys.trainer(tmp_path).fit(module, token_loader(8))
    module.broken = False
    toys.trainer(tmp_path).fit(module, token_loader(8))
    (whole,) = gradients(tmp_path, token_loader(8))
    torch.testing.assert_close(module.gradients, [whole], rtol=1e-6, atol=1e-6)


class TwoOptimizers(toys.ByHand, Weighted):
    """Steps two optimizers after one backward pass; both hold the first bias."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]))

    def configure_optimizers(self) -> Any:
        first, second = self.net.first.parameters(), self.net.second.parameters()
        shared = self.net.first.bias
        return [torch.optim.SGD(first, lr=1e-12), torch.optim.SGD([shared, *second], lr=1e-12)]


def test_every_optimizer_that_steps_after_a_backward_pass_gets_the_same_gradients(tmp_path: Path) -> None:
    runs = []
    for module in (Weighted(), TwoOptimizers()):
        toys.trainer(tmp_path).fit(module, token_loader(2))
        runs.append(module.gradients)
    assert len(runs[0]) == 4
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_factor_on_the_device_gives_the_same_bits_as_a_number(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    factor = 1024.0 * 3 / 7
    number, tensor = ([torch.randn(50, generator=generator.manual_seed(1)).to(dtype)] for _ in range(2))
    before = number[0].clone()
    multiply(number, factor)
    multiply(tensor, torch.tensor(factor, dtype=torch.float64))
    assert torch.equal(number[0], tensor[0])
    torch.testing.assert_close(number[0], before * factor)
    multiply([], torch.tensor(factor))


def test_a_count_of_the_host_trains_as_one_of_the_device(tmp_path: Path) -> None:
    class OfHost(Weighted):
        def token_loss(self, loss_sum: Tensor, num_tokens: Tensor | float) -> Tensor:
            return super().token_loss(loss_sum, float(num_tokens))

    found = [gradients(tmp_path, token_loader(2), kind, accumulate_grad_batches=3) for kind in (Weighted, OfHost)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
