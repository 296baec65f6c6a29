"""Gradients of single rows are those that autograd gives row by row (V5), and sketches keep their norms (V6)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_lora import LoRAConfig, inject_lora, lora_layers
from lightning_lora.batch.noise.noise_scale import noise_scale_of_steps, signal_and_trace
from lightning_lora.batch.noise.per_example_gradients import adapter_row_gradients, sketch_matrix, weight_row_sketches
from tests.batch.noise.linear_teacher import LinearTeacher


class Block(torch.nn.Module):
    """Attention over positions, an MLP, and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(6, 6) for _ in range(3))
        self.up, self.down = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.q(x) @ self.k(x).mT / 6**0.5).softmax(-1)
        x = x + scores @ self.v(x)
        return x + self.down(torch.tanh(self.up(x)))


def model(dtype: torch.dtype) -> torch.nn.Sequential:
    torch.manual_seed(0)
    net = torch.nn.Sequential(Block(), Block()).to(dtype)
    inject_lora(net, LoRAConfig(rank=3, targets=["q", "k", "v", "up", "down"], dropout=0.2))
    for layer in lora_layers(net).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return net


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_gradient_of_each_row_is_that_of_autograd(dtype: torch.dtype, tolerance: float) -> None:
    net, x = model(dtype), torch.randn(5, 4, 6, dtype=dtype, generator=torch.Generator().manual_seed(2))
    # Dropout draws anew in each call: off here, its place in the formula is tested below.
    net.eval()
    layers = lora_layers(net)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():

        def keep(module: object, inputs: tuple[Tensor], output: Tensor, name: str = name) -> None:
            output.register_hook(lambda d_y: seen.__setitem__(name, (inputs[0].detach(), d_y)))

        layer.register_forward_hook(keep)
    net(x).square().sum().backward()
    whole = dict(seen)
    for name, layer in layers.items():
        spec = layer.lora_specs["weight"]
        found = adapter_row_gradients(*whole[name], layer.lora_A.detach(), layer.lora_B.detach(), spec.scale)
        squares = torch.cat([factor.flatten(1) for factor in found], 1).square().sum(1)
        for row in range(len(x)):
            net.zero_grad()
            net(x[row : row + 1]).square().sum().backward()
            gradients = [factor.grad for factor in layer.lora_factors().values()]
            expected = sum(float(gradient.square().sum()) for gradient in gradients if gradient is not None)
            assert float(squares[row]) == pytest.approx(expected, rel=tolerance)


def sketches(x: Tensor, d_y: Tensor, side: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (sketch_matrix(side, part.shape[-1], generator).double() for part in (d_y, x))
    return weight_row_sketches(x, d_y, left, right.T)


def test_sketches_keep_square_norms_and_with_them_the_noise_scale() -> None:
    teacher = LinearTeacher.make(48, 48)
    x, d_y = (part[:, None] for part in teacher.rows(64, torch.Generator().manual_seed(0)))
    exact = torch.einsum("nto,nti->noi", d_y, x).square().sum((1, 2))
    ratios = torch.stack([sketches(x, d_y, 32, seed).square().sum((1, 2)) / exact for seed in range(8)]).mean(1)
    assert float(ratios.mean()) == pytest.approx(1, abs=0.05)
    assert ratios.sub(1).abs().max() < 0.25


def test_the_noise_scale_of_sketched_rows_is_that_of_the_weight() -> None:
    teacher = LinearTeacher.make(48, 48)
    x, d_y = (part[:, None] for part in teacher.rows(25_600, torch.Generator().manual_seed(0)))
    values = []
    for seed in range(8):
        rows = sketches(x, d_y, 32, seed).view(-1, 64, 32 * 32)
        estimate = noise_scale_of_steps(*signal_and_trace(rows.square().sum(-1), rows.mean(1).square().sum(-1), 1))
        values.append(estimate.value)
    assert sum(values) / 8 == pytest.approx(teacher.weight_noise_scale, rel=0.1)
