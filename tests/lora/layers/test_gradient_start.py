"""Adapters that start along the gradient of the weights (LoRA-GA): in its singular vectors, with outputs unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    ConfigError,
    GradientError,
    LoRAConfig,
    count_parameters,
    disable_lora,
    inject_lora,
    load_adapter,
    lora_layers,
    merge_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.lora.gradient_start import gradient_init
from lightning_lora.mixin.optim import parameter_groups
from tests.support.moe_models import moe

Batches = list[tuple[Tensor, Tensor]]


def network(num_out: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), Conv1D(7, 8), nn.Tanh(), nn.Linear(7, num_out)).double()


def batches(count: int = 3, num_out: int = 6) -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(9, 10).double(), torch.randn(9, num_out).double()) for _ in range(count)]


def squares(module: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: (module(batch[0]) - batch[1]).square().mean()


def started(data: Batches, **settings: Any) -> tuple[nn.Module, Any]:
    """The base, and the same adapted."""
    base = network(data[0][1].shape[1])
    module = copy.deepcopy(base)
    inject_lora(module, LoRAConfig(rank=2, init="gradient", **settings))
    gradient_init(module, squares(module), data)
    return base, module


def gradients(base: nn.Module, data: Batches) -> list[Tensor]:
    """Sums of the gradients of the three weights ``(out, in)``."""
    module: Any = copy.deepcopy(base)
    for batch in data:
        squares(module)(batch).backward()
    return [module[0].weight.grad, module[2].weight.grad.T, module[4].weight.grad]


def train(module: nn.Module, data: Batches, steps: int = 4) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(module, 1e-2), betas=(0.9, 0.95))
    for _ in range(steps):
        optimizer.zero_grad()
        squares(module)(data[0]).backward()
        optimizer.step()


def test_factors_are_singular_vectors_of_the_gradient_in_closed_form() -> None:
    data = batches()
    base, module = started(data)
    for G, layer in zip(gradients(base, data), lora_layers(module).values(), strict=True):
        U, _, Vh = torch.linalg.svd(G)
        signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()[: len(U)]
        c = len(G) ** 0.25 / 16**0.5
        A, B = (factor.detach() for factor in layer.lora_pair())
        torch.testing.assert_close(A[:2], c * (signs[:4] * Vh[:4])[:2], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(B[:, :2], c * (U[:, :4] * signs[:4].T)[:, 2:4], rtol=1e-9, atol=1e-12)
        assert torch.equal(A[2:], A[:2])
        assert torch.equal(B[:, 2:], -B[:, :2])


def test_outputs_at_the_start_and_the_base_stay_as_they_were() -> None:
    data = batches()
    base, module = started(data)
    x = data[0][0]
    assert (module(x) - base(x)).abs().max() < 1e-13
    layers = lora_layers(module).values()
    assert not any(layer.lora_moved for layer in layers)
    inject_lora(plain := network(), LoRAConfig(rank=2))
    assert count_parameters(module).trainable == count_parameters(plain).trainable
    kept = [layer.lora_A[2:].detach().clone() for layer in layers]
    train(module, data)
    assert all(layer.lora_moved for layer in layers)
    assert all(torch.equal(before, layer.lora_A[2:]) for before, layer in zip(kept, layers, strict=True))
    assert all(torch.equal(module.state_dict()[name], weight) for name, weight in base.state_dict().items())
    with disable_lora(module):
        assert torch.equal(module(x), base(x))
    trained = module(x)
    merge_lora(module)
    assert (module(x) - trained).abs().max() < 1e-12
    unmerge_lora(module)
    assert torch.equal(module(x), trained)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_the_gradient_and_its_vectors_are_those_of_peft() -> None:
    data = [(x.float(), y.float()) for x, y in batches()]
    base = network().float()
    kind: Any = "lora_ga"
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["0", "4"], init_lora_weights=kind,
        lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
    )  # fmt: skip
    theirs: Any = copy.deepcopy(base)

    def step() -> None:
        for batch in data:
            squares(theirs)(batch).backward()

    preprocess_loraga(theirs, config, step)
    values = [torch.linalg.svdvals(theirs[place]._peft_loraga_grad) for place in (0, 4)]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs, config).base_model.model
    ours: Any = copy.deepcopy(base)
    inject_lora(ours, LoRAConfig(rank=2, alpha=3.0, init="gradient", targets=["0", "4"]))
    gradient_init(ours, squares(ours), data)
    for place, S in zip((0, 4), values, strict=True):
        A, B = (getattr(theirs[place], f)["default"].weight.detach() for f in ("lora_A", "lora_B"))
        own_A, own_B = ours[place].lora_A.detach()[:2], ours[place].lora_B.detach()[:, :2]
        c = len(B) ** 0.25 / 16**0.5
        # PEFT multiplies B with the singular values, and A with nothing; the paper multiplies both with c.
        torch.testing.assert_close(own_A.abs(), c * A.abs(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own_B.abs() * S[2:4], B.abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_a_saved_adapter_is_a_plain_lora_to_peft_and_to_us(scaling: str, tmp_path: Path) -> None:
    data = batches()
    base, module = started(data, scaling=scaling, targets=["0", "4"])
    train(module, data)
    save_adapter(module, tmp_path)
    x = data[0][0]
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    assert theirs.peft_config["default"].init_lora_weights is True
    assert (theirs(x) - module(x)).abs().max() < 1e-10
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), module(x))


def test_a_narrow_layer_uses_the_vectors_that_there_are() -> None:
    data = batches(num_out=3)
    base, module = started(data, rank_pattern={"4": 2})
    G = gradients(base, data)[2]
    U, _, Vh = torch.linalg.svd(G)
    layer: Any = module[4]
    c = 3**0.25 / 4
    torch.testing.assert_close(layer.lora_A[:2].abs(), c * Vh[:2].abs())
    torch.testing.assert_close(layer.lora_B[:, :2].abs(), c * U[:, 1:3].abs())


def test_a_layer_without_a_gradient_keeps_the_default_start_and_components_without_a_vector_too() -> None:
    module: Any = nn.ModuleDict({"used": nn.Linear(6, 5), "unused": nn.Linear(6, 5)})
    inject_lora(module, LoRAConfig(rank=2, init="gradient"))
    drawn = module["used"].lora_A.detach().clone()
    torch.manual_seed(0)
    gradient_init(module, lambda x: module["used"](x).square().sum(), [torch.randn(1, 6)])
    assert not module["unused"].lora_B.any()
    # One row of data is one direction: the second component starts as by default.
    A, B = module["used"].lora_A.detach(), module["used"].lora_B.detach()
    assert torch.equal(A[1], drawn[1])
    assert not B[:, 1].any()
    assert B[:, 0].any()
    assert torch.equal(A[:2], A[2:])


def test_gradients_of_the_caller_stay() -> None:
    data = batches()
    module = network()
    inject_lora(module, LoRAConfig(rank=2, init="gradient", targets=["0"], trainable=["4"]))
    squares(module)(data[0]).backward()
    before = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    gradient_init(module, squares(module), data)
    after = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not module[0]._forward_hooks  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    data = batches()
    _, plain = started(data)
    module = network()
    inject_lora(module, LoRAConfig(rank=2, init="gradient"))

    def loss(batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        y = checkpoint(module, x, use_reentrant=use_reentrant)
        return (y - batch[1]).square().mean()

    gradient_init(module, loss, data)
    for one, other in zip(lora_layers(module).values(), lora_layers(plain).values(), strict=True):
        torch.testing.assert_close(one.lora_A[:2], other.lora_A[:2])
        torch.testing.assert_close(one.lora_B, other.lora_B)


def test_embeddings_start_by_default_and_other_kinds_are_refused_by_name() -> None:
    table: Any = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5))
    inject_lora(table, LoRAConfig(rank=2, init="gradient", adapt_embeddings=True))
    gradient_init(table, lambda ids: table(ids).square().sum(), [torch.arange(9)])
    assert not table[0].lora_A.any()
    assert table[1].lora_B.any()
    conv = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Linear(5, 5))
    with pytest.raises(ConfigError, match=r"gradients of linear layers, and 1 of 2 .*: 0 \(Conv1d\).*exclude"):
        inject_lora(conv, LoRAConfig(rank=2, init="gradient"))
    assert not lora_layers(conv)
    with pytest.raises(ConfigError, match=r"2 of 2 .*self_attn \(MultiheadAttention\), self_attn.out_proj"):
        inject_lora(
            nn.TransformerEncoderLayer(8, 2, 8), LoRAConfig(rank=2, targets=["self_attn", "out_proj"], init="gradient")
        )
    with pytest.raises(ConfigError, match=r"gate_up_proj .*exclude"):
        inject_lora(moe("mixtral"), LoRAConfig(rank=2, init="gradient"))


def test_bad_calls_say_what_is_wrong_and_change_nothing() -> None:
    data = batches()
    plain = network()
    inject_lora(plain, LoRAConfig(rank=2))
    with pytest.raises(ConfigError, match=r"no adapter waits .* init='gradient'"):
        gradient_init(plain, squares(plain), data)
    module: Any = network()
    inject_lora(module, LoRAConfig(rank=2, init="gradient"))
    with pytest.raises(ConfigError, match="batches is empty"):
        gradient_init(module, squares(module), [])
    with pytest.raises(GradientError, match=r"NaN or infinite in 3 of 3 layers \(0, 2, 4\)"):
        gradient_init(module, lambda batch: squares(module)(batch) * float("nan"), data)
    with pytest.raises(ConfigError, match="none of 3 layers received one"):
        gradient_init(module, lambda batch: batch[0].sum().requires_grad_(), data)
    assert not any(layer.lora_B.any() for layer in lora_layers(module).values())
    gradient_init(module, squares(module), data)
    with pytest.raises(ConfigError, match="have started already"):
        gradient_init(module, squares(module), data)
