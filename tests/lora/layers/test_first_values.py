"""First values of the factors: every init starts as the base, keeps it, and trains as its paper and PEFT say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    ConfigError,
    GuardError,
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
from lightning_lora.lora.growth import grow_adapters
from lightning_lora.mixin.optim import check_optimizers, parameter_groups
from tests.support import toys
from tests.support.moe_models import moe
from tests.support.toys import Toy

pytestmark = toys.expected_warnings


class Mixed(nn.Module):
    """A convolution, a transposed one, a transposed linear, attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2)
        self.transposed = Conv1D(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tanh(self.transposed(self.up(torch.tanh(self.conv(x))).flatten(2).mT.contiguous()))
        return self.head(self.attention(rows, rows, rows)[0].mean(1))


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (linear, lambda: torch.randn(5, 10)),
    "mixed": (Mixed, lambda: torch.randn(3, 2, 4, 4)),
}
every_case = pytest.mark.parametrize("name", CASES)


def built(name: str, **settings: Any) -> tuple[Any, Any, Tensor]:
    """The base, the adapted module, and inputs, in float64."""
    torch.manual_seed(0)
    base = CASES[name][0]().double().eval()
    x = CASES[name][1]().double()
    module = copy.deepcopy(base)
    inject_lora(module, LoRAConfig(rank=2, **settings))
    return base, module, x


def train(module: nn.Module, x: Tensor, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(module, 1e-2), betas=(0.9, 0.95))
    for _ in range(steps):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()


@every_case
@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_a_random_pair_starts_as_the_base_and_leaves_it_bit_identical(name: str, init: str, scaling: str) -> None:
    base, module, x = built(name, init=init, scaling=scaling)
    assert (module(x) - base(x)).abs().max() < 1e-12
    assert not any(layer.lora_moved for layer in lora_layers(module).values())
    train(module, x)
    assert (module(x) - base(x)).abs().max() > 1e-3
    assert all(layer.lora_moved for layer in lora_layers(module).values())
    for key, weight in base.state_dict().items():
        assert torch.equal(module.state_dict()[key], weight)
    with disable_lora(module):
        assert torch.equal(module(x), base(x))
    trained = module(x)
    merge_lora(module)
    assert (module(x) - trained).abs().max() < 1e-12
    unmerge_lora(module)
    assert torch.equal(module(x), trained)


def test_pissa_trains_the_principal_part_as_its_paper_says() -> None:
    base, module, x = built("linear", init="pissa", alpha=3.0)
    scale, first = 1.5, []
    for W in (base[0].weight, base[2].weight):
        U, S, Vh = torch.linalg.svd(W.detach(), full_matrices=False)
        root = (S[:2] / scale).sqrt()
        first.append((root[:, None] * Vh[:2], U[:, :2] * root))
    factors = [nn.Parameter(factor) for pair in first for factor in pair]
    residuals = [W - scale * B @ A for W, (A, B) in zip((base[0].weight, base[2].weight), first, strict=True)]
    optimizer = torch.optim.AdamW(factors, lr=1e-1, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    for _ in range(10):
        optimizer.zero_grad()
        pairs = zip(residuals, factors[::2], factors[1::2], strict=True)
        W0, W2 = (R.detach() + scale * B @ A for R, A, B in pairs)
        y = nn.functional.linear(torch.tanh(nn.functional.linear(x, W0, base[0].bias)), W2, base[2].bias)
        y.square().sum().backward()
        optimizer.step()
    train(module, x, steps=10)
    for layer, A, B in zip((module[0], module[2]), factors[::2], factors[1::2], strict=True):
        assert (layer.lora_A[:2] - A).abs().max() < 1e-9
        assert (layer.lora_B[:, :2] - B).abs().max() < 1e-9


def test_pissa_is_that_of_peft() -> None:
    torch.manual_seed(0)
    base = linear()
    settings = {"target_modules": ["0", "2"], "init_lora_weights": "pissa"}
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=3, **settings)).double()
    ours = copy.deepcopy(base)
    inject_lora(ours, LoRAConfig(rank=2, alpha=3.0, init="pissa"))
    ours.double()
    x = torch.randn(5, 10).double()
    assert (ours(x) - theirs(x)).abs().max() < 1e-6
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-1, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0
    )
    for _ in range(5):
        optimizer.zero_grad()
        theirs(x).square().sum().backward()
        optimizer.step()
    train(ours, x)
    for name in ("0", "2"):
        layer: Any = theirs.base_model.model.get_submodule(name)
        own: Any = ours.get_submodule(name)
        effective = layer.base_layer.weight + layer.get_delta_weight("default")
        assert (own.weight + own.weight_delta() - effective).abs().max() < 1e-5
        assert float((effective - base.get_submodule(name).weight).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_a_saved_pissa_adapter_is_a_plain_lora_of_twice_the_rank_to_peft_and_to_us(
    scaling: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = linear()
    module = copy.deepcopy(base)
    inject_lora(module, LoRAConfig(rank=2, init="pissa", scaling=scaling, rank_pattern={"2": 3}))
    x = torch.randn(5, 10)
    train(module, x)
    save_adapter(module, tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert theirs.peft_config["default"].init_lora_weights is True
    assert (theirs(x) - module(x)).abs().max() < 1e-5
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), module(x))
    assert [spec.rank for layer in lora_layers(again).values() for spec in layer.lora_specs.values()] == [4, 6]


def test_what_stays_of_a_pissa_adapter_is_not_counted_and_not_moved() -> None:
    _, module, x = built("linear", init="pissa")
    _, plain, _ = built("linear")
    assert count_parameters(module).trainable == count_parameters(plain).trainable
    kept = [layer.lora_A[2:].detach().clone() for layer in lora_layers(module).values()]
    train(module, x)
    assert all(torch.equal(a, b.lora_A[2:]) for a, b in zip(kept, lora_layers(module).values(), strict=True))


def test_weight_decay_of_a_kept_start_is_refused() -> None:
    _, module, _ = built("linear", init="pissa")
    trained = [p for p in module.parameters() if p.requires_grad]
    with pytest.raises(GuardError, match="weight decay would change the part of the adapters that keeps their start"):
        check_optimizers(module, [torch.optim.AdamW(trained, weight_decay=0.1)])
    check_optimizers(module, [torch.optim.AdamW(trained, weight_decay=0.0)])


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_growing_keeps_the_function_and_goes_on_training(init: str) -> None:
    base, module, x = built("linear", init=init)
    train(module, x)
    before = module(x).detach()
    ranks = {name: layer.lora_spec.rank + 2 for name, layer in lora_layers(module).items()}
    grow_adapters(module, ranks)
    assert (module(x) - before).abs().max() < 1e-12
    train(module, x)
    with disable_lora(module):
        assert torch.equal(module(x), base(x))
    assert all(bool(layer.lora_B[:, -2:].any()) for layer in lora_layers(module).values())


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_each_expert_starts_from_its_own_weight(init: str) -> None:
    torch.manual_seed(0)
    module = moe("mixtral").eval()
    tokens = torch.arange(12).view(2, 6)
    expected = module(tokens).logits
    inject_lora(module, LoRAConfig(rank=4, targets="experts", init=init))
    assert (module(tokens).logits - expected).abs().max() < 1e-5
    module(tokens).logits.square().sum().backward()
    factors = [factor for layer in lora_layers(module).values() for factor in layer.lora_factors().values()]
    assert all(factor.grad is not None and bool(factor.grad.any()) for factor in factors)
    merge_lora(module)
    assert (module(tokens).logits - expected).abs().max() < 1e-5


def test_orthogonal_factors_are_those_of_peft() -> None:
    theirs: Any = peft.get_peft_model(
        nn.Sequential(nn.Linear(300, 200)),
        peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights="orthogonal"),
    )
    ours = nn.Sequential(nn.Linear(300, 200))
    inject_lora(ours, LoRAConfig(rank=8, init="orthogonal"))
    pairs: list[tuple[Tensor, Tensor]] = []
    layer: Any = theirs.base_model.model[0]
    pairs.append((layer.lora_A["default"].weight, layer.lora_B["default"].weight))
    own: Any = ours[0]
    pairs.append((own.lora_A, own.lora_B))
    for A, B in pairs:
        assert (B @ A).abs().max() < 1e-6
        assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 4
        # Each entry has variance 1 / 200: half a row of a rotation, over 10.
        assert float(A.detach().var() * 200) == pytest.approx(1, rel=0.2)
        assert float(B.detach().var() * 200) == pytest.approx(1, rel=0.2)


def test_an_odd_rank_is_refused_for_orthogonal_factors() -> None:
    module = linear()
    with pytest.raises(ConfigError, match="init='orthogonal' needs an even rank, got rank=3 for '2'"):
        inject_lora(module, LoRAConfig(rank=2, rank_pattern={"2": 3}, init="orthogonal"))
    assert not lora_layers(module)


def test_shared_experts_cannot_start_from_their_own_weights() -> None:
    with pytest.raises(ConfigError, match="set share_expert_factors to false"):
        inject_lora(moe("mixtral"), LoRAConfig(rank=4, targets="experts", init="pissa", share_expert_factors=True))


def test_layers_without_weights_refuse_to_start_from_them() -> None:
    with torch.device("meta"):
        module = linear()
    inject_lora(module, LoRAConfig(rank=2, init="pissa"))
    module.to_empty(device="cpu")
    with pytest.raises(ConfigError, match="init='pissa' starts from the values of the weights"):
        next(iter(lora_layers(module).values())).reset_parameters()


def trained(folder: Path, init: str, steps: int, ckpt_path: str | None = None) -> Toy:
    seed_everything(1, verbose=False)
    module = Toy()
    module.lora = LoRAConfig(rank=2, init=init)
    trainer = toys.trainer(folder, max_epochs=-1, max_steps=steps)
    trainer.fit(module, toys.loader(), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_resume_is_exact(init: str, tmp_path: Path) -> None:
    whole = trained(tmp_path, init, 6)
    trained(tmp_path, init, 3)
    resumed = trained(tmp_path, init, 6, str(tmp_path / "3.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
