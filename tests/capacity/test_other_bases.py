"""The monitor on quantised bases and mixtures of experts: nothing moves, and numbers are those of the model by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig, LoRAMixin, count_parameters
from lightning_lora.callbacks import CapacityMonitor
from lightning_lora.capacity.half_rank import cut_factors
from lightning_lora.lora.layers.adapted import learning_weights
from tests.support import moe_models, quantised_models, toys

pytestmark = toys.expected_warnings


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lora.capacity.heat_map.draw_capacity", lambda *_: None)


class Decaying(LoRAMixin):
    """A module around any network, whose learning rate falls to zero in 12 steps."""

    def __init__(self, net: nn.Module, lora: dict[str, Any]) -> None:
        super().__init__()
        self.net, self.lora = net, LoRAConfig(**{"rank": 4} | lora)

    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return self.net(**batch).loss
        return (self.net(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.lora_parameter_groups(2e-3))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 12)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def vectors(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 128, generator=generator), torch.randn(count, 8, generator=generator))


def fit(folder: Path, net: nn.Module, lora: dict[str, Any], data: Any, *callbacks: Callback) -> Decaying:
    torch.manual_seed(0)
    module = Decaying(net, lora)
    trainer = toys.trainer(folder, callbacks=list(callbacks), max_epochs=3)
    trainer.fit(module, DataLoader(data, 4), DataLoader(data, 4))
    return module


@torch.no_grad()
def cut_by_hand(module: Decaying, rank_of: Any) -> float:
    """The loss with every update cut; the module is not used again."""
    for layer, weight in learning_weights(module).values():
        A, B = layer.lora_pair(weight)
        cut = cut_factors(A, B, rank_of(layer.lora_specs[weight].rank))
        A.copy_(cut[0])
        B.copy_(cut[1])
    return float("nan")


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "int8", "torchao-int8"])
def test_quantised(kind: str, tmp_path: Path) -> None:
    data = vectors(16, 1)
    for lora in ({}, {"dora": True}):
        monitor = CapacityMonitor()
        settings = {"targets": ["first", "second"]} | lora
        alone = fit(tmp_path, quantised_models.quantised(kind), settings, data)
        watched = fit(tmp_path, quantised_models.quantised(kind), settings, data, monitor)
        print(kind, lora, monitor.reading.sentence(), monitor.reading.num_captured, monitor.reading.no_capture)
        assert toys.same(*({n: p for n, p in toys.snapshot(m).items() if "lora" in n} for m in (alone, watched)))
        assert quantised_models.stored(alone) == quantised_models.stored(watched)
        assert monitor.reading.parameters == count_parameters(watched).trainable


@pytest.mark.parametrize("name", list(moe_models.BUILDERS))
def test_experts(name: str, tmp_path: Path) -> None:
    data: Any = toys.token_rows(16, 8, 64)
    for lora in ({}, {"share_expert_factors": True}, ):
        monitor = CapacityMonitor()
        alone = fit(tmp_path, moe_models.moe(name).train(), lora, data)
        watched = fit(tmp_path, moe_models.moe(name).train(), lora, data, monitor)
        r = monitor.reading
        print(name, lora, r.sentence(), r.num_captured, r.num_weights, r.no_capture, {k: (v.rank, v.share, v.capture) for k, v in r.groups.items()})
        assert toys.same(*map(toys.snapshot, (alone, watched)))
        assert monitor.reading.parameters == count_parameters(watched).trainable
