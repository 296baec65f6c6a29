"""The monitor with the settings that users combine: each number is what the effective weights give by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, count_parameters
from lightning_lora.callbacks import CapacityMonitor, LoRA, RankGrowth
from lightning_lora.lora.layers.adapted import learning_weights
from tests.support import toys

pytestmark = [pytest.mark.slow, *toys.expected_warnings]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than these runs."""
    monkeypatch.setattr("lightning_lora.capacity.heat_map.draw_capacity", lambda *_: None)


class Decaying(toys.Toy):
    """Its learning rates fall to zero; one schedule for each group."""

    def __init__(self, lora: dict[str, Any]) -> None:
        super().__init__()
        chosen: dict[str, Any] = {"rank": 2} | lora
        self.lora = LoRAConfig(**chosen)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.lora_parameter_groups(5e-3))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def watched(folder: Path, module: LightningModule, *others: Callback, **options: Any) -> CapacityMonitor:
    monitor = CapacityMonitor()
    torch.manual_seed(0)
    settings = {"max_epochs": -1, "max_steps": 24, "accumulate_grad_batches": 2} | options
    trainer = toys.trainer(folder, callbacks=[*others, monitor], **settings)
    trainer.fit(module, DataLoader(toys.rows(32), 4, shuffle=True), toys.loader(32, seed=1))
    return monitor


def truncated_loss(module: Any, half: bool) -> float:
    """The held-out loss of plain layers with the best updates of half of the rank, or with the base weights."""
    plain = toys.Net()
    with torch.no_grad():
        for name, (layer, _) in learning_weights(module).items():
            A, B = layer.lora_pair()
            U, S, V = torch.linalg.svd(layer.lora_spec.scale * B @ A)
            keep = layer.lora_spec.rank // 2 if half else 0
            weight = layer.weight + (U[:, :keep] * S[:keep]) @ V[:keep]
            if layer.lora_spec.config.dora and half:
                weight = weight * (layer.lora_magnitude / weight.norm(dim=1)).unsqueeze(1)
            own = plain.get_submodule(name.removeprefix("net."))
            own.load_state_dict({"weight": weight, "bias": layer.bias})
        x, y = toys.rows(32).tensors
        return float((plain(x) - y).square().mean())


@pytest.mark.parametrize(
    "lora",
    [
        {"dora": True},
        {"init": "pissa", "rank": 1},
        {"init": "orthogonal"},
        {"scaling": "rslora"},
        {"lora_plus_ratio": 4.0},
        {"lr_multiplier_pattern": {"first": 2.0}},
        {"rank_pattern": {"second": 1}},
    ],
    ids=str,
)
def test_losses_at_half_rank_and_without_adapters_are_those_of_plain_weights(
    lora: dict[str, Any], tmp_path: Path
) -> None:
    module = Decaying(lora)
    reading = watched(tmp_path, module).reading
    assert reading.half_loss == pytest.approx(truncated_loss(module, half=True), rel=1e-5)
    assert reading.bare_loss == pytest.approx(truncated_loss(module, half=False), rel=1e-5)
    assert reading.parameters == count_parameters(module).trainable
    assert reading.rate <= 0.1
    assert reading.num_captured == reading.num_weights == 2
    assert reading.no_capture == ""


def test_a_rate_is_low_only_when_it_is_low_in_every_group(tmp_path: Path) -> None:
    class TwoSchedules(Decaying):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.lora_parameter_groups(5e-3))
            stays = {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda n: 0.9**n])}
            return [optimizer], [stays | {"interval": "step"}]

    reading = watched(tmp_path, TwoSchedules({"lora_plus_ratio": 16.0})).reading
    assert reading.rate == 1.0
    assert not reading.is_settled


def test_ranks_that_grow_in_mid_run_are_measured_as_they_are(tmp_path: Path) -> None:
    module = Decaying({"rank": 1})
    growth = RankGrowth(max_rank=2, every_n_steps=6, threshold=1e-9)
    reading = watched(tmp_path, module, growth).reading
    assert growth.growths
    assert {layer.lora_spec.rank for layer, _ in learning_weights(module).values()} == {2}
    assert reading.parameters == count_parameters(module).trainable
    assert reading.half_loss == pytest.approx(truncated_loss(module, half=True), rel=1e-5)
    assert [group.rank for group in reading.groups.values()] == [2, 2]


def test_a_second_fit_begins_anew(tmp_path: Path) -> None:
    monitor = watched(tmp_path / "one", Decaying({}))
    fresh = watched(tmp_path / "two", Decaying({"rank": 1}))
    trainer = toys.trainer(tmp_path, callbacks=[monitor], max_epochs=-1, max_steps=24, accumulate_grad_batches=2)
    torch.manual_seed(0)
    trainer.fit(Decaying({"rank": 1}), DataLoader(toys.rows(32), 4, shuffle=True), toys.loader(32, seed=1))
    assert monitor.reading == fresh.reading


class Plain(toys.Plain):
    """A module that knows nothing of adapters; its ``predict_step`` takes inputs only."""

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 24), "interval": "step"}]


def test_a_module_that_knows_nothing_of_adapters_is_measured(tmp_path: Path) -> None:
    module = Plain()
    reading = watched(tmp_path, module, LoRA(LoRAConfig(rank=2))).reading
    assert reading.half_loss == pytest.approx(truncated_loss(module, half=True), rel=1e-5)
    assert reading.capture_rate is not None


def test_a_frozen_copy_of_the_network_keeps_its_rank(tmp_path: Path) -> None:
    """A teacher that follows the network is no adapter in training: cutting it too would move what is learnt."""

    class Taught(Decaying):
        def configure_model(self) -> None:
            super().configure_model()
            self.apply_lora()
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + (self(batch[0]) - self.teacher(batch[0])).square().mean()

    module = Taught({})
    reading = watched(tmp_path, module).reading
    assert set(reading.groups) == {"net.first", "net.second"}
    assert reading.num_weights == 2


class Mixed(toys.Toy):
    """An embedding, a convolution and a linear layer."""

    lora = LoRAConfig(rank=2, adapt_embeddings=True, targets=["conv", "head", "embedding"])

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict(
            {"embedding": nn.Embedding(10, 8), "conv": nn.Conv1d(8, 8, 3), "head": nn.Linear(8, 2)}
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 4).long().clamp(max=9)
        return self.net["head"](self.net["conv"](self.net["embedding"](tokens).mT).mean(-1))

    configure_optimizers = Plain.configure_optimizers


def test_layers_that_are_not_linear_are_cut_and_the_sentence_says_what_capture_leaves_out(tmp_path: Path) -> None:
    module = Mixed()
    reading = watched(tmp_path, module).reading
    assert (reading.num_captured, reading.num_weights) == (1, 3)
    assert len(reading.groups) == 3
    assert "tangent capture of 1 of 3 weights" in replace(reading, bare_loss=9.0, half_loss=8.0).sentence()


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions_are_measured(precision: Any, tmp_path: Path) -> None:
    reading = watched(tmp_path, Decaying({}), precision=precision).reading
    assert reading.loss is not None
    assert reading.num_captured == 2
    assert reading.has_gained


def test_a_module_that_steps_by_hand_says_what_it_must_return(tmp_path: Path) -> None:
    class ByHand(Decaying):
        def __init__(self) -> None:
            super().__init__({})
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # pyright: ignore
            optimizers: Any = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizers.step()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad])

    with pytest.warns(UserWarning, match="predict_step returns no mapping"):
        monitor = watched(tmp_path, ByHand(), accumulate_grad_batches=1)
    assert monitor.verdict == "UNDETERMINED"


def test_what_gives_no_verdict_is_said_at_the_start_and_in_the_sentence(tmp_path: Path) -> None:
    class Constant(Decaying):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.lora_parameter_groups(5e-3))

    with pytest.warns(UserWarning, match="has no learning-rate schedule") as said:
        monitor = watched(tmp_path, Constant({}))
    assert len([each for each in said if "capacity" in str(each.message)]) == 1
    assert "has not decayed" in monitor.reading.sentence()


def test_few_rows_and_training_rows_are_named_in_the_sentence(tmp_path: Path) -> None:
    def sentence(held_out: DataLoader[Any] | None) -> str:
        monitor = CapacityMonitor()
        trainer: Trainer = toys.trainer(tmp_path, callbacks=[monitor], max_epochs=-1, max_steps=24)
        trainer.fit(Decaying({}), DataLoader(toys.rows(32), 4), held_out)
        return monitor.reading.sentence()

    assert "by training rows, as there are no validation rows" in sentence(None)
    assert "by 3 held-out losses, which are few" in sentence(toys.loader(6))
    assert "a gain from 1 loss cannot be told from chance: use 256 held-out rows" in sentence(toys.loader(2))
