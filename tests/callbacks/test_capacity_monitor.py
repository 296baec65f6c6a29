"""A capacity monitor leaves the run bit for bit as it is, and says what it measured, or once why it does not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_lora import LoRAConfig, LoRAMixin, lora_layers
from lightning_lora.callbacks import CapacityMonitor
from lightning_lora.data import SFTDataModule
from lightning_lora.files.events import read_events
from lightning_lora.tasks import CausalLM
from tests.support import toys

pytestmark = toys.expected_warnings


class Decaying(toys.Toy):
    """Its loss has dropout and a metric that is updated by every training step, and its learning rate falls to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.seen = nn.BatchNorm1d(4), 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen += 1
        x, y = batch
        loss = (self(nn.functional.dropout(self.norm(x), 0.2, self.training)) - y).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Trace(Callback):
    """Everything that a run does: batches, gradients, weights and random numbers of every step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        tensors = [*batch, *pl_module.parameters(), *pl_module.buffers(), torch.get_rng_state()]
        tensors += [p.grad for p in pl_module.parameters() if p.grad is not None]
        tensors += [each for state in trainer.optimizers[0].state.values() for each in state.values()]
        self.steps.append(torch.cat([tensor.detach().flatten().double() for tensor in tensors]).clone())


def fit(folder: Path, *callbacks: Callback, module: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    module = module or Decaying()
    settings = {"max_epochs": -1, "max_steps": 12, "accumulate_grad_batches": 2} | options
    trainer = toys.trainer(folder, callbacks=list(callbacks), **settings)
    train = DataLoader(toys.rows(20), 2, shuffle=True)
    trainer.fit(module, train, toys.loader(6, seed=3), ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 1, "precision": "bf16-mixed"}])
def test_a_run_is_the_same_with_a_monitor(options: dict[str, Any], tmp_path: Path) -> None:
    alone, watched, monitor = Trace(), Trace(), CapacityMonitor()
    modules = fit(tmp_path, alone, **options), fit(tmp_path, monitor, watched, **options)
    assert all(map(torch.equal, alone.steps, watched.steps))
    assert len(alone.steps) == len(watched.steps)
    assert modules[0].seen == modules[1].seen
    assert modules[1].training == modules[0].training
    assert "log" not in vars(modules[1])
    assert monitor.reading.loss is not None
    assert monitor.reading.rate <= 0.1


def test_what_is_measured_is_what_the_module_gives_by_hand(tmp_path: Path) -> None:
    monitor = CapacityMonitor()
    module = fit(tmp_path, monitor)
    reading = monitor.reading
    module.eval()
    x, y = toys.rows(6, 3).tensors
    train_x, train_y = toys.rows(20).tensors
    with torch.no_grad():
        loss = float((module(module.norm(x)) - y).square().mean())
        train = float((module(module.norm(train_x)) - train_y).square().mean())
        for layer in lora_layers(module).values():
            layer.lora_B.zero_()
        bare = float((module(module.norm(x)) - y).square().mean())
    assert reading.loss == pytest.approx(loss, rel=1e-5)
    assert reading.bare_loss == pytest.approx(bare, rel=1e-5)
    assert reading.tokens == 20
    assert reading.parameters == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert reading.train_loss is not None
    assert reading.base_loss is not None
    bits = 20 * (reading.base_loss - reading.train_loss) / math.log(2) / reading.parameters
    assert reading.bits_per_parameter == pytest.approx(bits)
    assert reading.train_loss == pytest.approx(train, rel=1e-5)


def test_a_run_leaves_events_a_picture_and_one_sentence(tmp_path: Path, capsys: Any) -> None:
    monitor = CapacityMonitor()
    fit(tmp_path, monitor)
    events = list(read_events(tmp_path))
    kinds = [event["event"] for event in events]
    assert kinds.count("capacity_verdict") == 1
    assert events[-1]["sentence"] == monitor.reading.sentence()
    assert set(events[-1]["groups"]) == {"net.first", "net.second"}
    assert (tmp_path / "capacity.png").stat().st_size > 1000
    steps = sorted({event["step"] for event in events if "capacity/loss" in event})
    assert steps[-1] == 12


def test_a_resumed_run_gives_the_same_reading(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole, resumed = CapacityMonitor(), CapacityMonitor()
    fit(tmp_path / "whole", whole, Saves())
    fit(tmp_path / "resumed", resumed, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.reading == whole.reading
    assert resumed.verdict == whole.verdict


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(toys.rows(8))


class Bare(Decaying):
    lora = None


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [(Bare(), toys.rows(8), "has no adapters"), (Decaying(), Stream(), "rows cannot be chosen")],
)
def test_what_cannot_be_measured_is_said_once(module: Any, data: Any, message: str, tmp_path: Path) -> None:
    monitor = CapacityMonitor()
    with pytest.warns(UserWarning, match=message) as said:
        toys.trainer(tmp_path, max_steps=3, max_epochs=-1, callbacks=[monitor]).fit(module, DataLoader(data, 2))
    assert sum("capacity monitor" in str(each.message) for each in said) == 1
    assert monitor.verdict == "UNDETERMINED"


class Images(LoRAMixin):
    """A classifier of images with convolutions, which knows nothing of losses of rows."""

    lora = LoRAConfig(rank=2)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.lora_parameter_groups(1e-2))
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 16), "interval": "step"}
        ]


def test_a_classifier_of_images_is_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data: Dataset[Any] = TensorDataset(torch.randn(32, 3, 6, 6), torch.randint(0, 4, (32,)))
    monitor = CapacityMonitor()
    toys.trainer(tmp_path, max_epochs=1, callbacks=[monitor]).fit(Images(), DataLoader(data, 2))
    assert monitor.reading.loss is not None
    assert monitor.reading.groups["net.0"].capture is None
    assert monitor.reading.tokens == 32


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files of training and validation rows of different lengths."""
    folder = tmp_path_factory.mktemp("conversations")
    for name, count in (("train", 16), ("validation", 4)):
        lines = [{"question": "what " * (1 + n % 5), "answer": str(n) * (1 + n % 4)} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "train.jsonl"), str(folder / "validation.jsonl")


@pytest.mark.parametrize("packing", [False, "length"])
def test_a_language_model_is_trained_bit_equal_with_a_monitor(
    packing: Any, llama_folder: Path, conversations: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are sums over tokens, divided at the end of a step; packed rows hold several examples."""
    monkeypatch.setattr("lightning_lora.capacity.heat_map.draw_capacity", lambda *_: None)

    def trained(*callbacks: Callback) -> LightningModule:
        torch.manual_seed(0)
        lora = LoRAConfig(rank=2, dropout=0.1)
        module = CausalLM(str(llama_folder), learning_rate=1e-3, lora=lora, warmup_steps=2, schedule="linear")
        data = SFTDataModule(*conversations, batch_size=2, max_length=60, packing=packing)
        toys.trainer(tmp_path, max_epochs=5, accumulate_grad_batches=1, callbacks=list(callbacks)).fit(module, data)
        return module

    monitor = CapacityMonitor(num_rows=8)
    monitor.gradient_rows = 16
    assert toys.same(*map(toys.snapshot, (trained(), trained(monitor))))
    assert monitor.reading.capture_rate is not None
    assert monitor.reading.num_captured == 14
    assert monitor.reading.tokens is not None
    assert monitor.reading.tokens > 30
    assert len(monitor.reading.groups) == 4
