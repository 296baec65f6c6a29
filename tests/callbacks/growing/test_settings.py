"""Growth with every way to start, scale and train factors, and what a checkpoint of a grown run asks of a module."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_lora import LoRAConfig, load_adapter, save_adapter
from lightning_lora.callbacks import rank_growth
from lightning_lora.checkpoints import grown_ranks
from lightning_lora.lora.layers.adapted import adapted_weights
from tests.callbacks.test_rank_growth import WideLoRA, computed, grow_often, ranks
from tests.support import resuming, toys

pytestmark = [*toys.expected_warnings]

SETTINGS: dict[str, dict[str, Any]] = {
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"rank": 1, "init": "pissa", "scaling": "rslora"},
    "gradient": {"rank": 1, "init": "gradient"},
    "dora": {"dora": True, "init": "orthogonal"},
    "rates": {"lora_plus_ratio": 4.0, "lr_multiplier_pattern": {"first": 3.0}, "scaling": "rslora"},
    "narrow type": {"adapter_dtype": "bfloat16", "init": "gaussian"},
}


def dicey(settings: dict[str, Any]) -> type[LightningModule]:
    class Ours(resuming.DiceyLoRA):
        def __init__(self) -> None:
            super().__init__()
            self.net = toys.Net(width=16)
            self.lora = LoRAConfig(**{"rank": 2, "alpha": 4, "dropout": 0.1} | settings)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.lora_parameter_groups(0.005))

    return Ours


@pytest.mark.parametrize("name", SETTINGS)
def test_growth_keeps_the_function_and_goes_on_exactly(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, moves, grow = dicey(SETTINGS[name]), [], rank_growth._grow

    def watched(trainer: Trainer, module: LightningModule, new: dict[str, int]) -> None:
        module.eval()
        with torch.no_grad():
            before = module(toys.rows(8).tensors[0])
            grow(trainer, module, new)
            moves.append(float((module(toys.rows(8).tensors[0]) - before).abs().max()))
        module.train()

    monkeypatch.setattr(rank_growth, "_grow", watched)

    def run(ckpt: Path | None = None) -> resuming.Outcome:
        # PiSSA has factors of twice the rank. An odd rank is none that an orthogonal adapter starts with.
        return resuming.run(make, tmp_path, ckpt, callbacks=[grow_often(max_rank=3)])

    whole = run()
    assert moves
    assert max(moves) <= 1e-6
    for place in ("batch-0-1", "batch-0-3", "batch-1-4"):
        assert not resuming.unlike(whole, run(tmp_path / f"{place}.ckpt")), place
    grown = make.load_from_checkpoint(
        max(tmp_path.glob("batch-2-*.ckpt")), map_location="cpu", weights_only=True
    ).eval()
    assert set(ranks(grown).values()) & {3}
    save_adapter(grown, tmp_path / "adapter")
    again = resuming.Dicey()
    again.net = toys.Net(width=16)
    load_adapter(again, tmp_path / "adapter")
    again.eval()
    assert ranks(again) == ranks(grown)
    torch.testing.assert_close(computed(again), computed(grown), rtol=0, atol=1e-6)
    kept = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    described = {weight: kept["rank_pattern"].get(weight, kept["r"]) for weight in ranks(grown)}
    assert described == ranks(grown)


OTHER: dict[str, Any] = {
    **{"rank": 3, "alpha": 3.0, "rank_pattern": {"0": 2}, "alpha_pattern": {"0": 3.0}, "scaling": "rslora"},
    **{"init": "gaussian", "share_expert_factors": True, "dora": True},
}


@dataclass(frozen=True)
class Later(LoRAConfig):
    """Settings of a later version."""

    of_a_later_version: bool = False


def manifest(module: LightningModule, config: LoRAConfig) -> dict[str, Any]:
    specs = {name: layer.lora_specs[weight] for name, (layer, weight) in adapted_weights(module).items()}
    return {
        "ranks": {name: 2 * spec.rank for name, spec in specs.items()},
        "alphas": {name: 2 * spec.alpha for name, spec in specs.items()},
        "config": config.to_dict(),
    }


def adapted() -> WideLoRA:
    module = WideLoRA()
    module.configure_model()
    return module


@pytest.mark.parametrize("name", [field.name for field in fields(LoRAConfig) if field.name not in grown_ranks._FREE])
def test_ranks_are_taken_only_where_every_setting_that_ranks_follow_from_is_equal(name: str) -> None:
    module = adapted()
    own = LoRAConfig.from_dict(module.lora)  # pyright: ignore[reportArgumentType]
    assert len(grown_ranks.ranks_to_take(module, manifest(module, own))) == 3
    assert len(grown_ranks.ranks_to_take(module, manifest(module, replace(own, dropout=0.3, lr_multiplier=2.0)))) == 3
    # A setting without an entry in OTHER is new: say there what else it may be, and think of growth.
    assert not grown_ranks.ranks_to_take(module, manifest(module, replace(own, **{name: OTHER[name]})))


def test_a_setting_that_nobody_thought_of_is_compared() -> None:
    module = adapted()
    for layer, weight in adapted_weights(module).values():
        layer.lora_specs[weight] = replace(layer.lora_specs[weight], config=Later(rank=1, alpha=2))
    assert grown_ranks.ranks_to_take(module, manifest(module, Later(rank=1, alpha=2)))
    assert not grown_ranks.ranks_to_take(module, manifest(module, Later(rank=1, alpha=2, of_a_later_version=True)))
