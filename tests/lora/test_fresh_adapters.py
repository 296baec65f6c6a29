"""A fresh adapter changes no bit: the base's own products come first, and an update of zero is added to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, disable_lora, inject_lora, merge_lora
from lightning_lora.errors import ConfigError
from lightning_lora.lora.layers.expert_weights import ExpertWeight
from tests.support.moe_models import BUILDERS, moe

TYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = 4 + (torch.arange(3 * 24).reshape(3, 24) * 7) % 60


class Attention(nn.Module):
    """Three projections of one input, as models have them, and a gated network behind."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(160, 96), nn.Linear(160, 32, bias=False), nn.Linear(160, 32)
        self.gate, self.up, self.down = nn.Linear(160, 320), nn.Linear(160, 320), nn.Linear(320, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        return self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: 3 * torch.randn(*shape)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "siblings": (Attention, rows(2, 60, 160)),
    "many rows, merged in the step": (Attention, rows(1000, 160)),
    "one row": (Attention, rows(1, 160)),
    "rows that are not contiguous": (Attention, lambda: rows(6, 7, 160)().transpose(0, 1)),
    "images that are not contiguous": (Attention, lambda: rows(2, 160, 5, 6)().permute(0, 2, 3, 1)),
    "every other column": (Attention, lambda: rows(50, 320)()[:, ::2]),
    "transposed linear": (lambda: Conv1D(96, 160), rows(2, 60, 160)),
    "convolution": (lambda: nn.Conv2d(16, 24, 3, padding=1, stride=2, groups=2), rows(2, 16, 9, 9)),
    "depthwise convolution": (lambda: nn.Conv1d(32, 32, 4, groups=32), rows(2, 32, 20)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(16, 24, 3, stride=2), rows(2, 16, 9, 9)),
    "embedding": (lambda: nn.Embedding(60, 32, padding_idx=0), lambda: TOKENS % 60),
    "encoder": (lambda: nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, dropout=0.0), rows(3, 12, 64)),
    "decoder": (lambda: nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0), rows(12, 3, 64)),
    "recurrent": (lambda: nn.GRU(32, 48, num_layers=2, bidirectional=True), rows(12, 3, 32)),
}

# Torch reads their weights itself, and on some processors multiplies by frozen ones in another order.
READ_BY_TORCH = ("encoder", "decoder", "recurrent")


def output(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


def autocast(active: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if active else nullcontext()


@pytest.mark.parametrize("dtype", [*TYPES, "autocast"], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_fresh_adapter_changes_no_bit(name: str, dtype: Any) -> None:
    build, draw = LAYERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base, x = build(), draw()
    if dtype != "autocast":
        base = base.to(dtype)
        x = x.to(dtype) if x.is_floating_point() else x
    module = copy.deepcopy(base)
    inject_lora(module, LoRAConfig(rank=4, adapt_embeddings=name == "embedding"))
    for training in (False, True):
        for model in (base, module):
            model.train(training)
        with autocast(dtype == "autocast"):
            # As a user compares them: the base as it was loaded, before anything froze it.
            with torch.no_grad():
                expected = [output(base.requires_grad_(True), x)]
                if name in READ_BY_TORCH:
                    expected.append(output(base.requires_grad_(False), x))
                assert any(torch.equal(output(module, x), each) for each in expected)
                with disable_lora(module):
                    assert any(torch.equal(output(module, x), each) for each in expected)
            if x.is_contiguous() and name != "encoder":
                # Torch multiplies rows that are not contiguous in another order once a weight is frozen.
                base.requires_grad_(False)
                # From the second call on, siblings are computed together.
                assert all(torch.equal(output(module, x), output(base, x)) for _ in range(3))
    merge_lora(module.eval())
    with autocast(dtype == "autocast"), torch.no_grad():
        assert torch.equal(output(module, x), output(base.eval().requires_grad_(True), x))


def input_gradient(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_gradient_of_the_input_is_the_bases_bit_for_bit_or_closer_to_exact(dtype: torch.dtype) -> None:
    base = Attention().to(dtype)
    module = copy.deepcopy(base.requires_grad_(False))
    inject_lora(module, LoRAConfig(rank=4))
    x = torch.randn(2, 30, 160, dtype=dtype)
    for num_rows in (30, 30, 5):
        expected, found = (input_gradient(model, x[:, :num_rows]) for model in (base, module))
        if dtype == torch.float32:
            assert torch.equal(found, expected)
            continue
        # Gradients of siblings are added up within their products, and rounded once.
        exact = input_gradient(copy.deepcopy(base).double(), x[:, :num_rows].double())
        assert (found - exact).norm() <= 1.01 * (expected - exact).norm()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", BUILDERS)
def test_fresh_experts_change_no_bit_of_output_and_gradient(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No expert's B A is ever formed on the way.
    monkeypatch.delattr(ExpertWeight, "effective")
    base = moe(name).requires_grad_(False)
    if name != "llama4":
        base.set_experts_implementation(implementation)
    with torch.no_grad():
        # Larger than a model's first weights, and biases that are not zero, so that the order of sums shows.
        for parameter in base.parameters():
            parameter.normal_(std=0.2)
    for dtype in (*TYPES, "autocast"):
        if implementation == "grouped_mm" and name in ("qwen3_moe", "qwen3_next") and dtype in TYPES[1:]:
            continue  # torch's grouped product refuses their width
        plain: Any = copy.deepcopy(base)
        if dtype != "autocast":
            plain = plain.to(dtype)
        module = copy.deepcopy(plain)
        inject_lora(module, LoRAConfig(rank=4))
        hidden: Tensor = plain.get_input_embeddings()(TOKENS)
        for model in (module, plain):
            model.train()
        leaves = [hidden.clone().requires_grad_() for _ in range(2)]
        with autocast(dtype == "autocast"):
            found, expected = (
                model(inputs_embeds=leaf).logits for leaf, model in zip(leaves, (module, plain), strict=True)
            )
        assert torch.equal(found, expected)
        for y in (found, expected):
            y.float().square().sum().backward()
        found, expected = (torch.as_tensor(leaf.grad) for leaf in leaves)
        if dtype in TYPES and name != "qwen3_next":
            assert torch.equal(found, expected)
        else:
            # Autocast multiplies elsewhere, and linear attention reads the input of siblings between their calls.
            assert (found - expected).float().norm() <= 0.02 * expected.float().norm()


def test_a_kernel_that_reads_weights_gets_the_effective_ones_and_refuses_dropout() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    def kernel(layer: Any, *inputs: Tensor) -> Tensor:
        assert type(layer.gate_up_proj) is not ExpertWeight
        return grouped_mm_experts_forward(layer, *inputs)

    ALL_EXPERTS_FUNCTIONS["a_kernel"] = kernel
    try:
        model = moe("mixtral")
        inject_lora(model, LoRAConfig(rank=4, targets="experts", dropout=0.1))
        with torch.no_grad():
            for name, factor in model.named_parameters():
                if "lora_B" in name:
                    factor.normal_(std=0.2)
        expected = model(TOKENS).logits
        model.config._experts_implementation = "a_kernel"
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
        model(TOKENS).logits.sum().backward()
        assert all(factor.grad is not None for name, factor in model.named_parameters() if "lora_" in name)
        with pytest.raises(ConfigError, match=r"'a_kernel', a kernel that reads their weights.*grouped_mm"):
            model.train()(TOKENS)
    finally:
        del ALL_EXPERTS_FUNCTIONS["a_kernel"]
