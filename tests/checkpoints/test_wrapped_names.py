"""One checkpoint serves a module and the same module compiled or checkpointed, in both directions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_lora import AdapterFileError, LoRAConfig, inject_lora, load_lora_state_dict, lora_state_dict
from lightning_lora.callbacks import AdapterEMA
from tests.support import toys
from tests.support.toys import Net, Toy

pytestmark = toys.expected_warnings


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


class Normed(Net):
    """A net with a buffer, and a module trained in full."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("center", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(torch.tanh(self.first(x)) - self.center))  # pyright: ignore[reportOperatorIssue]


class Wrapped(Toy):
    """A module whose net is wrapped, as users do before training."""

    lora = LoRAConfig(rank=2, trainable=("norm",))

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.net = wrap(Normed())  # pyright: ignore[reportAttributeAccessIssue]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda net: net,
    "compiled": compiled,
    "checkpointed": checkpoint_wrapper,
    "both": lambda net: compiled(checkpoint_wrapper(net)),
}


class Save(Callback):
    """Writes a checkpoint after two optimizer steps and one more batch, so that it holds gradients too."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 0 and trainer.global_step == 2 and batch_idx == 4:
            trainer.save_checkpoint(Path(trainer.default_root_dir, "open.ckpt"))


def fit(folder: Path, name: str, epochs: int, ckpt_path: Path | None = None) -> Wrapped:
    """Epochs of six batches in windows of two."""
    torch.manual_seed(0)
    module = Wrapped(WRAPPERS[name])
    callbacks = [AdapterEMA(0.5), Save()]
    runner = toys.trainer(folder, max_epochs=epochs, callbacks=callbacks, accumulate_grad_batches=2)
    runner.fit(module, toys.loader(12), ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each wrapping within an open window."""
    folders = {name: tmp_path_factory.mktemp(name) for name in WRAPPERS}
    for name, folder in folders.items():
        fit(folder, name, epochs=1)
    return {name: folder / "open.ckpt" for name, folder in folders.items()}


def values(module: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in module.state_dict().values()]


@pytest.mark.parametrize(("written", "read"), list(itertools.permutations(WRAPPERS, 2)))
def test_a_run_continues_in_another_wrapping_as_in_its_own(
    written: str, read: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    found = fit(tmp_path / "other", read, 2, checkpoints[written])
    expected = fit(tmp_path / "whole", read, 2)
    # Compiled layers compute in another order; a moment that is lost moves the weights by 1e-2.
    torch.testing.assert_close(values(found), values(expected), rtol=0, atol=1e-5)


def test_names_that_do_not_fit_are_shown_beside_those_that_do() -> None:
    model, other = nn.ModuleDict({"net": Net()}), nn.ModuleDict({"nets": Net()})
    for module in (model, other):
        inject_lora(module, LoRAConfig(rank=2))
    with pytest.raises(AdapterFileError, match=r"missing nets.first.lora_A, unknown net.first.lora_A, missing nets"):
        load_lora_state_dict(other, lora_state_dict(model))
