"""LoRA+ and learning rates of single layers: own groups with the rates asked for, which runs print, keep and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import ConfigError, LoRAConfig, TargetNotFoundError
from lightning_lora.lora.adapter import inject_lora
from lightning_lora.mixin.optim import parameter_groups
from tests.support import toys
from tests.support.toys import Toy

pytestmark = toys.expected_warnings


def rates(module: Toy) -> dict[str, tuple[float, int]]:
    return {group["name"]: (group["lr"], len(group["params"])) for group in module.lora_parameter_groups(0.1)}


def toy(**settings: Any) -> Toy:
    module = Toy()
    module.lora = LoRAConfig(rank=2, **settings)
    module.apply_lora()
    return module


def test_at_ratio_one_and_without_patterns_there_is_the_one_group_of_adapters() -> None:
    (group,) = toy(lora_plus_ratio=1, lr_multiplier_pattern={"first": 10.0}).lora_parameter_groups(0.1)
    assert set(group) == {"params", "name", "weight_decay", "eps", "lr", "asked_lr"}
    assert (group["name"], group["lr"], len(group["params"])) == ("adapters", 1.0, 4)


def test_lora_plus_trains_the_factor_that_starts_at_zero_at_ratio_times_the_rate() -> None:
    module = toy(lora_plus_ratio=16.0)
    plain, plus = module.lora_parameter_groups(0.1)
    assert (plain["name"], plain["lr"], plus["name"], plus["lr"]) == ("adapters", 1.0, "adapters_plus", 16.0)
    assert all(bool(factor.any()) for factor in plain["params"])
    assert not any(bool(factor.any()) for factor in plus["params"])
    assert plain["weight_decay"] == plus["weight_decay"] == 0
    assert plain["eps"] == plus["eps"] == 1e-12


def test_lora_plus_trains_a_of_an_embedding_faster() -> None:
    table = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    inject_lora(table, LoRAConfig(rank=2, adapt_embeddings=True, lora_plus_ratio=4.0))
    plain, plus = parameter_groups(table, 0.1)
    assert [id(p) for p in plain["params"]] == [id(table[0].lora_B), id(table[1].lora_A)]
    assert [id(p) for p in plus["params"]] == [id(table[0].lora_A), id(table[1].lora_B)]


def test_a_pattern_replaces_the_multiplier_of_adapters_and_multiplies_the_rate_of_trained_modules() -> None:
    module = toy(targets=["first"], trainable=["second"], lr_multiplier_pattern={"first": 3.0, "net.second": 0.5})
    assert rates(module) == {"adapters_x3": (pytest.approx(0.3), 2), "full_x0.5": (0.05, 2)}
    with pytest.warns(UserWarning, match="lr_multiplier_pattern 'first' has no effect: the first match wins"):
        module = toy(lr_multiplier_pattern={"net.fir*": 3.0, "first": 7.0}, lora_plus_ratio=2.0)
    assert rates(module) == {
        "adapters_x3": (pytest.approx(0.3), 1),
        "adapters_x3_plus": (pytest.approx(0.6), 1),
        "adapters": (1.0, 1),
        "adapters_plus": (2.0, 1),
    }


def test_patterns_mean_names_below_lora_root_and_outside_of_it() -> None:
    module = Toy()
    module.head = nn.Linear(2, 2)
    module.lora_root = "net"
    module.lora = LoRAConfig(rank=2, trainable=["head"], lr_multiplier_pattern={"fir*": 3.0, "head": 0.5})
    module.apply_lora()
    assert rates(module).keys() == {"adapters", "adapters_x3", "full_x0.5"}


def test_a_pattern_that_matches_nothing_is_refused_with_nothing_changed() -> None:
    module = Toy()
    module.lora = LoRAConfig(rank=2, lr_multiplier_pattern={"frist": 3.0})
    with pytest.raises(TargetNotFoundError, match=r"pattern 'frist' matches neither .*did you mean 'first"):
        module.apply_lora()
    assert all(parameter.requires_grad for parameter in module.parameters())
    module = toy()
    module.lora = LoRAConfig(rank=2, lr_multiplier_pattern={"frist": 3.0})
    with pytest.raises(TargetNotFoundError, match="lr_multiplier_pattern 'frist'"):
        module.lora_parameter_groups(0.1)


@pytest.mark.parametrize("settings", [{"lora_plus_ratio": 0.0}, {"lr_multiplier_pattern": {"first": -1.0}}])
def test_rates_of_zero_or_below_are_refused(settings: Any) -> None:
    with pytest.raises(ConfigError, match="must be greater than 0"):
        LoRAConfig(**settings)


class Rated(Toy):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.lora_parameter_groups(1e-3))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def rated() -> Rated:
    torch.manual_seed(1)
    module = Rated()
    module.lora = LoRAConfig(
        rank=2, targets=["first"], trainable=["second"], lora_plus_ratio=4.0, lr_multiplier_pattern={"second": 0.5}
    )
    return module


def trained(folder: Path, steps: int, ckpt_path: str | None = None) -> tuple[Rated, Any]:
    module = rated()
    trainer = toys.trainer(folder, max_epochs=-1, max_steps=steps)
    trainer.fit(module, toys.loader(), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module, trainer


def test_resume_keeps_the_rates_of_every_group_exactly(tmp_path: Path) -> None:
    whole, whole_trainer = trained(tmp_path, 6)
    trained(tmp_path, 3)
    resumed, trainer = trained(tmp_path, 6, str(tmp_path / "3.ckpt"))
    assert [g["lr"] for g in trainer.optimizers[0].param_groups] == [
        g["lr"] for g in whole_trainer.optimizers[0].param_groups
    ]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_start_prints_each_rate_and_whose_it_is(caplog: Any, capsys: Any) -> None:
    rated_module = rated()
    rated_module.apply_lora()
    with caplog.at_level("INFO"):
        rated_module.lora_parameter_groups(1e-3)
    text = caplog.text + "".join(capsys.readouterr())
    assert "learning rate 0.001 x 10 = 0.01 for A of 1 adapters" in text
    assert "learning rate 0.001 x 40 = 0.04 for B of 1 adapters" in text
    assert "learning rate 0.001 x 0.5 = 0.0005 for 2 parameters trained in full" in text


def trajectory(p: float, q: float) -> list[Tensor]:
    """Effective weights over steps of Adam with (alpha, A, rate and eps) changed as the invariance says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(8, 6).double(), torch.randn(8, 4).double()
    config = LoRAConfig(rank=3, alpha=32 / (p * q), lr_multiplier=10 * p, lora_plus_ratio=q / p)
    torch.manual_seed(1)
    inject_lora(model, config)
    groups = parameter_groups(model, 1e-3)
    adapters: list[Any] = [model[0], model[2]]
    for layer in adapters:
        layer.lora_A.data *= p
    for group in groups:
        group["eps"] = 1e-6 / (q if group["name"].endswith("_plus") else p)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    weights = []
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        weights += [layer.weight_delta().detach() for layer in adapters]
    return weights


@pytest.mark.parametrize(("p", "q"), [(2.0, 0.5), (0.25, 3.0), (4.0, 4.0)])
def test_rates_alpha_and_first_values_can_be_exchanged_without_changing_training(p: float, q: float) -> None:
    expected = trajectory(1.0, 1.0)
    assert max(float((a - b).abs().max()) for a, b in zip(trajectory(p, q), expected, strict=True)) < 1e-10
    assert float(expected[-1].abs().max()) > 1e-2
