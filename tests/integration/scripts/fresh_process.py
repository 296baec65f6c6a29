"""Trains small modules in one process and gets them back in another one, with other random numbers.

Usage: ``fresh_process.py train|load FOLDER``. Every module comes with the mixin and with the callback, and goes through
a checkpoint and an adapter folder. The file ``train.json`` tells what each start said, ``load.json`` how the outputs
differ from the trained module's, or the error.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from lightning_lora import LoRAConfig, LoRAError, LoRAMixin, load_adapter, save_adapter
from lightning_lora.callbacks import LoRA, LoRAGuard
from tests.support import toys

X = torch.linspace(-2, 2, 32).reshape(8, 4)
Y = torch.linspace(-1, 1, 16).reshape(8, 2)
FOLDER = Path(sys.argv[2])


def body(*after: nn.Module) -> nn.Sequential:
    net = nn.Sequential()
    net.add_module("first", nn.Linear(4, 8))
    for number, module in enumerate(after):
        net.add_module(f"next{number}", module)
    return net


class Base(LightningModule):
    settings = LoRAConfig(rank=2, targets=["first"])

    def __init__(self) -> None:
        super().__init__()
        self.net = self.build()

    def build(self) -> nn.Module:
        """A base that a file holds: its values are not those of a fresh layer."""
        net = body(*self.middle(), nn.Linear(8, 2))
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in net.parameters():
                parameter.copy_(torch.randn(parameter.shape))
        return net

    def middle(self) -> list[nn.Module]:
        return [nn.Tanh()]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Pretrained(Base):
    pass


class Random(Base):
    def build(self) -> nn.Module:
        return body(nn.Tanh(), nn.Linear(8, 2))


class RandomHead(Base):
    """A new output layer beside a body from a file, which only the values tell."""

    def build(self) -> nn.Module:
        net = super().build()
        net.next1 = nn.Linear(8, 2)
        return net


class NewHead(Base):
    """A transformers model whose checkpoint holds no head."""

    settings = LoRAConfig(rank=2)

    def build(self) -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(FOLDER / "llama", num_labels=2).train()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(input_ids=(x * 4).long().abs() + 3).logits


class NewHeadTwice(NewHead):
    """The same with a frozen copy that does not follow yet."""

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]) + self.target(input_ids=(batch[0] * 4).long().abs() + 3).logits


class BatchNorm(Base):
    def middle(self) -> list[nn.Module]:
        return [nn.BatchNorm1d(8), nn.Tanh()]


class SpectralNorm(Base):
    """Its power iteration moves two vectors at every step."""

    def middle(self) -> list[nn.Module]:
        return [spectral_norm(nn.Linear(8, 8)), nn.Tanh()]

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return super().build()


class Range(nn.Module):
    """An observer: buffers that are infinite, or empty, until something was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(float("inf")))
        self.register_buffer("unseen", torch.tensor(float("-inf")))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.low = torch.minimum(self.low, x.detach().min())
        return x - self.low


class Observed(Base):
    def middle(self) -> list[nn.Module]:
        return [nn.Tanh(), Range()]


class MeanTeacher(Base):
    """Predicts by the average of a student, whose parameters it meets by position."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for own, other in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
                # Rounds even where both are equal.
                other.mul_(0.7).add_(own, alpha=0.3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(batch[0])
        return super().training_step(batch, batch_idx) + (self(batch[0]) - wanted).square().mean()

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.teacher(batch[0])


class OtherTeacher(MeanTeacher):
    """A teacher that starts from other weights than the student, and moves to it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for parameter in self.teacher.parameters():
                parameter.add_(0.5)


KINDS: dict[str, type[Base]] = {
    kind.__name__: kind
    for kind in (
        Pretrained,
        Random,
        RandomHead,
        NewHead,
        NewHeadTwice,
        BatchNorm,
        SpectralNorm,
        Observed,
        MeanTeacher,
        OtherTeacher,
    )
}
MIXED: dict[str, Any] = {
    name: type(f"Lora{name}", (LoRAMixin, kind), {"lora": kind.settings, "__module__": __name__})
    for name, kind in KINDS.items()
}


def loader() -> DataLoader[Any]:
    return DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)


def output(module: Any) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module.predict_step([X, Y], 0)


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += [line for line in record.getMessage().splitlines() if line.startswith("lora: ")]


def train() -> None:
    said: dict[str, list[str]] = {}
    for name in KINDS:
        for way in ("mixin", "callback"):
            log = Log()
            logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(log)
            module = MIXED[name]() if way == "mixin" else KINDS[name]()
            callbacks = [LoRAGuard()] if way == "mixin" else [LoRA(KINDS[name].settings), LoRAGuard()]
            trainer = toys.trainer(FOLDER, callbacks=callbacks, max_epochs=2)
            trainer.fit(module, loader())
            trainer.save_checkpoint(FOLDER / f"{name}-{way}.ckpt")
            save_adapter(module, FOLDER / f"{name}-{way}")
            torch.save(output(module), FOLDER / f"{name}-{way}.pt")
            logging.getLogger("lightning.pytorch.utilities.rank_zero").removeHandler(log)
            said[f"{name}-{way}"] = log.lines
    (FOLDER / "train.json").write_text(json.dumps(said))


def loaded(name: str, way: str, medium: str) -> Tensor:
    path = FOLDER / f"{name}-{way}"
    if medium == "folder":
        module = KINDS[name]()
        load_adapter(module, path)
        return output(module)
    if way == "mixin":
        return output(MIXED[name].load_from_checkpoint(f"{path}.ckpt", weights_only=True))
    trainer = toys.trainer(FOLDER, callbacks=[LoRA(KINDS[name].settings)])
    found = trainer.predict(KINDS[name](), loader(), ckpt_path=f"{path}.ckpt", weights_only=True)
    return torch.cat([*map(torch.as_tensor, found or [])])


def load() -> None:
    results: dict[str, Any] = {}
    for name in KINDS:
        for way in ("mixin", "callback"):
            wanted = torch.load(FOLDER / f"{name}-{way}.pt", weights_only=True)
            for medium in ("ckpt", "folder"):
                try:
                    result: Any = float((loaded(name, way, medium) - wanted).abs().max())
                except LoRAError as error:
                    result = f"{type(error).__name__}: {error}"
                results[f"{name}-{way}-{medium}"] = result
    adapted = type("Adapted", (LoRAMixin, BatchNorm), {"lora": BatchNorm.settings})
    again = adapted.load_from_checkpoint(FOLDER / "BatchNorm-callback.ckpt", weights_only=True)
    wanted = torch.load(FOLDER / "BatchNorm-callback.pt", weights_only=True)
    results["subclass"] = float((output(again) - wanted).abs().max())
    (FOLDER / "load.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.manual_seed({"train": 1, "load": 2}[sys.argv[1]])
    {"train": train, "load": load}[sys.argv[1]]()
