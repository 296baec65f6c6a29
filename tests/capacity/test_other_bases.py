"""The monitor on quantised bases and on mixtures of experts: nothing moves, and losses are those of the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig, LoRAMixin, count_parameters
from lightning_lora.callbacks import CapacityMonitor
from lightning_lora.capacity.reading import CapacityReading
from lightning_lora.lora.layers.adapted import learning_weights
from lightning_lora.lora.layers.quantised_weights import dequantised
from tests.capacity.test_settings import no_pictures
from tests.support import moe_models, quantised_models, toys

pytestmark = toys.expected_warnings
__all__ = ["no_pictures"]


class Decaying(LoRAMixin):
    """A module around any network, whose learning rate falls to zero in 12 steps."""

    def __init__(self, net: nn.Module, lora: dict[str, Any]) -> None:
        super().__init__()
        self.net, self.lora = net, LoRAConfig.from_dict({"rank": 4} | lora)

    def loss(self, batch: Any) -> Tensor:
        return self.net(**batch).loss if isinstance(batch, dict) else (self.net(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.lora_parameter_groups(2e-3))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 12)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(folder: Path, net: nn.Module, lora: dict[str, Any], data: Any, *callbacks: Callback) -> Decaying:
    torch.manual_seed(0)
    module = Decaying(net, lora)
    trainer = toys.trainer(folder, callbacks=list(callbacks), max_epochs=3)
    trainer.fit(module, DataLoader(data, 4, shuffle=True), DataLoader(data, 4))
    return module


def measured(folder: Path, net: nn.Module, lora: dict[str, Any], data: Any) -> tuple[Decaying, CapacityReading]:
    """A monitored run, which is bit for bit the one without a monitor, and what was measured."""
    monitor, other = CapacityMonitor(), copy.deepcopy(net)
    module = fit(folder, net, lora, data, monitor)
    factors = (toys.snapshot(each) for each in (fit(folder, other, lora, data), module))
    alone, watched = ({name: value for name, value in each.items() if "lora_" in name} for each in factors)
    assert alone
    assert toys.same(alone, watched)
    assert quantised_models.stored(other) == quantised_models.stored(net)
    assert monitor.reading.parameters == count_parameters(module).trainable
    assert monitor.reading.is_settled
    assert monitor.reading.half_loss is not None
    return module, monitor.reading


def at_half(layer: Any, weight: str = "weight") -> tuple[Tensor, Tensor]:
    """The best factors of half the rank, by the singular vectors of the whole product."""
    A, B = (factor.detach() for factor in layer.lora_pair(weight))
    U, S, V = torch.linalg.svd(B @ A, full_matrices=False)
    keep = layer.lora_specs[weight].rank // 2
    return V[..., :keep, :], U[..., :keep] * S[..., None, :keep]


@pytest.mark.parametrize(("kind", "dora"), [("nf4", False), ("nf4-dq", True), ("int8", False)])
def test_adapters_of_a_quantised_base_are_cut_and_captured(kind: str, dora: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(16, features, generator=generator) for features in (128, 8))
    settings = {"targets": ["first", "second"], "dora": dora}
    module, reading = measured(tmp_path, quantised_models.quantised(kind), settings, TensorDataset(x, y))
    plain: Any = quantised_models.plain()
    layers: Any = learning_weights(module)
    for name, (layer, _) in layers.items():
        A, B = at_half(layer)
        whole = dequantised(layer).float() + layer.lora_spec.scale * B @ A
        if dora:
            whole *= (layer.lora_magnitude.detach() / whole.norm(dim=1)).unsqueeze(1)
        plain.get_submodule(name.removeprefix("net.")).get_parameter("weight").data = whole
    with torch.no_grad():
        loss = float((plain(x) - y).square().mean())
    # int8 rounds the inputs too.
    assert reading.half_loss == pytest.approx(loss, rel=2e-2 if kind == "int8" else 1e-4)
    assert reading.num_captured == reading.num_weights == 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("mixtral", {"share_expert_factors": True}), ("llama4", {})], ids=str)
def test_experts_are_cut_each_and_attention_is_captured(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """The shared experts of Llama 4 get the tokens of all rows at once, and are left out of capture."""
    data: Any = toys.token_rows(16, 8, 64)
    module, reading = measured(tmp_path, moe_models.moe(name).train(), settings, data)
    assert (reading.num_captured, reading.no_capture) == (8, "")
    assert reading.num_weights == len(learning_weights(module)) > 8
    assert any("experts" in group for group in reading.groups)
    with torch.no_grad():
        for layer, weight in learning_weights(module).values():
            half, keep = at_half(layer, weight), layer.lora_specs[weight].rank // 2
            A, B = (torch.zeros(*half[0].shape[:-2], *f.shape[-2:]) for f in layer.lora_pair(weight))
            A[..., :keep, :], B[..., :keep] = half
            for factor, value in zip(layer.lora_pair(weight), (A, B), strict=True):
                factor.data = value
        module.eval()
        losses = [module.loss(batch) for batch in DataLoader(data, 4)]
        tokens = [(batch["labels"][:, 1:] != -100).sum() for batch in DataLoader(data, 4)]
    loss = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    assert reading.half_loss == pytest.approx(float(loss), rel=1e-4)
