"""Compiled modules under a Trainer: they learn, save and resume as eager ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, LoRAMixin
from lightning_lora.callbacks import FiniteGradients, LoRAGuard
from lightning_lora.data.batches.collate import Collate
from lightning_lora.tasks import CausalLM
from tests.lora.compiled.graphs import Graphs
from tests.support import toys

pytestmark = [pytest.mark.slow, *toys.expected_warnings]


class Mlp(LoRAMixin, LightningModule):
    """Two layers with one input, called by the LightningModule itself."""

    lora = LoRAConfig(rank=2, targets="all")

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.gate, self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).tanh() * self.up(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


def run(folder: Path, backend: Any = None, ckpt_path: Path | None = None, max_epochs: int = 4) -> Mlp:
    torch.manual_seed(0)
    torch.compiler.reset()
    module = Mlp()
    compiled: Any = module if backend is None else torch.compile(module, backend=backend)
    callbacks = [FiniteGradients(), LoRAGuard()]
    runner = toys.trainer(folder, callbacks=callbacks, max_epochs=max_epochs, enable_checkpointing=True)
    runner.fit(compiled, toys.loader(), ckpt_path=ckpt_path, weights_only=True)
    return module


def test_a_compiled_module_trains_saves_and_resumes_as_an_eager_one(tmp_path: Path) -> None:
    graphs = Graphs()
    eager, whole = run(tmp_path / "eager"), run(tmp_path / "whole", graphs.backend)
    for name, weight in toys.snapshot(eager).items():
        torch.testing.assert_close(toys.snapshot(whole)[name], weight, rtol=1e-5, atol=1e-6)
    # Three products of the base, three with B, and A x of gate and up in one.
    assert graphs.products[0] == 3 + 3 + 2
    run(tmp_path / "half", graphs.backend, max_epochs=2)
    (file,) = (tmp_path / "half").rglob("*.ckpt")
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert saved.keys() == {name for name, p in eager.named_parameters() if p.requires_grad}
    resumed = run(tmp_path / "half", graphs.backend, ckpt_path=file)
    assert toys.same(toys.snapshot(resumed), toys.snapshot(whole))
    crossed = run(tmp_path / "half", ckpt_path=file)
    for name, weight in toys.snapshot(eager).items():
        torch.testing.assert_close(toys.snapshot(crossed)[name], weight, rtol=1e-5, atol=1e-6)


class CompiledBlocks(CausalLM):
    """A task whose blocks are compiled, and whose loss is computed at the head."""

    graphs = Graphs()

    def configure_model(self) -> None:
        super().configure_model()
        model: Any = self.model
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend=self.graphs.backend)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_language_model_with_compiled_blocks_keeps_its_loss_at_the_head(tmp_path: Path) -> None:
    folder, made = toys.save_llama(tmp_path), []
    rows: Any = [{"input_ids": r["input_ids"].tolist(), "supervised": [True] * 10} for r in toys.token_rows()]
    torch.compiler.reset()
    for kind in (CausalLM, CompiledBlocks):
        torch.manual_seed(0)
        module = kind(str(folder), learning_rate=1e-3, lora=LoRAConfig(rank=2))
        toys.trainer(tmp_path).fit(module, DataLoader(rows, batch_size=4, collate_fn=Collate(0)))
        assert module._head_is_last
        made.append(toys.snapshot(module))
    eager, compiled = made
    assert eager.keys() == compiled.keys()
    for name, weight in eager.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-4, atol=1e-6)
    # Seven products of the base, seven with B, four with A.
    assert CompiledBlocks.graphs.products[0] == 7 + 7 + 4
