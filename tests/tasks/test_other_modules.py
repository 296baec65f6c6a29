"""Images, sound, sequences, sentences, two optimizers, several losses: LoRA is the same in any LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig, load_adapter, lora_layers, save_adapter
from lightning_lora.callbacks import LoRA, LoRAGuard
from tests.support import other_modules as modules
from tests.support import toys

pytestmark = toys.expected_warnings

LORA = LoRAConfig(rank=2)
WITH_HEAD = LoRAConfig(rank=2, trainable=["classifier"])


def classes(count: int = 8) -> Tensor:
    return torch.arange(count) % 5


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tokens(length: int = 6, step: int = 7) -> Tensor:
    return 4 + torch.arange(8 * length).reshape(8, length) * step % 60


class Task(NamedTuple):
    """A module, the LoRA settings of its callback (None: it has the mixin), its rows, and its number of layers."""

    name: str
    build: Callable[[], LightningModule]
    callback: LoRAConfig | None
    rows: tuple[Tensor, ...]
    num_layers: int


TASKS = [
    Task("image transformer", modules.ImageTransformer, WITH_HEAD, (normal(8, 3, 8, 8), classes()), 12),
    Task("image convnet", modules.ImageConvNet, WITH_HEAD, (normal(8, 3, 8, 8), classes()), 7),
    Task("speech", lambda: modules.Speech(WITH_HEAD), None, (normal(8, 8, 12), classes()), 15),
    Task("translation", lambda: modules.Translation(LORA), None, (tokens(), tokens(5, 11)), 32),
    Task("sentence encoder", lambda: modules.SentenceEncoder(LORA), None, (tokens(), tokens().flip(1)), 12),
    Task("adversaries", lambda: modules.Adversaries(LORA), None, (normal(8, 8), normal(8, 16)), 4),
    Task("many losses", modules.ManyLosses, LORA, (normal(8, 16), classes()), 3),
]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def built(task: Task) -> LightningModule:
    torch.manual_seed(0)
    return task.build()


def fit(task: Task, module: LightningModule, folder: Path) -> Trainer:
    """Six steps with the guard watching, and an evaluation in between."""
    loader: Any = DataLoader(TensorDataset(*task.rows), batch_size=4)
    callbacks = [LoRAGuard(patience=4), *([LoRA(task.callback)] if task.callback else [])]
    runner = toys.trainer(folder, callbacks=callbacks, max_epochs=3)
    runner.fit(module, loader, loader, weights_only=True)
    return runner


def outputs(task: Task, module: LightningModule) -> list[Tensor]:
    module.eval()
    with torch.no_grad():
        found = module(task.rows if isinstance(module, modules.Translation) else task.rows[0])
    return list(found) if isinstance(found, tuple) else [found]


@every_task
def test_adapters_move_and_the_base_does_not(task: Task, tmp_path: Path) -> None:
    module = built(task)
    before = toys.snapshot(module)
    fit(task, module, tmp_path)
    assert len(lora_layers(module)) == task.num_layers
    assert all(toys.moved(module))
    changed = {name for name, tensor in toys.base_of(module).items() if not torch.equal(tensor, before[name])}
    # New heads are trained in full.
    assert changed == {name for name in before if name.startswith("net.classifier.")}


@every_task
def test_the_saved_adapter_gives_a_fresh_module_the_trained_function(task: Task, tmp_path: Path) -> None:
    module, fresh = built(task), built(task)
    untrained = outputs(task, built(task))
    fit(task, module, tmp_path)
    save_adapter(module, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    trained = outputs(task, module)
    for one, other, base in zip(trained, outputs(task, fresh), untrained, strict=True):
        assert torch.equal(one, other)
        assert not torch.allclose(one, base, atol=1e-3)


def test_every_adapter_of_a_gan_is_in_exactly_one_optimizer(tmp_path: Path) -> None:
    task = next(task for task in TASKS if task.name == "adversaries")
    module = built(task)
    runner = fit(task, module, tmp_path)
    held = [[id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in runner.optimizers]
    assert isinstance(module, modules.Adversaries)
    for network, parameters in zip((module.net.generator, module.net.discriminator), held, strict=True):
        assert sorted(parameters) == sorted(id(p) for p in network.parameters() if p.requires_grad)
