"""What the user sets stays, whichever module it is; no setting changes what is learnt or measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import ConfigError, LoRAConfig, LoRAMixin, StepMemory, lora_layers
from lightning_lora.callbacks import LoRA
from lightning_lora.memory.other_settings import could_recompute
from lightning_lora.mixin.memory_settings import choices_of
from tests.callbacks.memory.wide_llama import Watched, fit, have, made
from tests.support import toys
from tests.support.monitored import Samples

pytestmark = [
    pytest.mark.slow,
    *toys.expected_warnings,
    *toys.monitor_warnings,
    pytest.mark.usefixtures("short_chunks"),
]


@pytest.mark.parametrize(
    "settings",
    [
        {"step_memory": {"gate": "keep", "head_rows": 64, "activation_checkpointing": False}},
        {"step_memory": {"gate": "keep", "head_rows": 16}, "activation_checkpointing": False},
        {"step_memory": {"gate": "keep"}, "activation_checkpointing": False},
        {"activation_checkpointing": False},
    ],
)
def test_what_is_set_stays_where_nothing_fits(
    settings: dict[str, Any], wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, 1)
    module = made(wide_llama, **settings)
    fit(module, tmp_path)
    asked = StepMemory.from_dict(settings.get("step_memory")).with_checkpointing(False)
    used = choices_of(module)
    assert used.activation_checkpointing is False
    assert used.gate == ("keep" if asked.gate == "keep" else "recompute")
    assert used.head_rows == (8 if asked.head_rows == "auto" else asked.head_rows)
    assert could_recompute(module.model)


@pytest.mark.parametrize("other", [{"gate": "keep"}, {"activation_checkpointing": True}])
def test_kept_gates_and_checkpointed_blocks_give_the_same_bits(
    other: dict[str, Any], wide_llama: Path, tmp_path: Path
) -> None:
    runs = []
    for memory in ({}, other):
        torch.manual_seed(0)
        module = made(wide_llama, lora=LoRAConfig(rank=2, dropout=0.2), step_memory=memory)
        fit(module, tmp_path)
        runs.append(module.seen)
    assert len(runs[0]) > 8
    assert all(torch.equal(one, same) for one, same in zip(*runs, strict=True))


def test_blocks_are_not_computed_again_beside_a_monitor_of_rows(
    wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, 1)
    module = made(wide_llama)
    fit(module, tmp_path, callbacks=[Samples()])
    assert choices_of(module) == StepMemory("recompute", 8, False)


def test_a_monitor_of_rows_measures_the_same_with_kept_gates(wide_llama: Path, tmp_path: Path) -> None:
    found = []
    for gate in ("recompute", "keep"):
        torch.manual_seed(0)
        fit(made(wide_llama, step_memory={"gate": gate}), tmp_path, callbacks=[monitor := Samples()])
        found.append(monitor.samples)
    assert len(found[0]) > 0
    assert found[0] == found[1]


class Unadapted(LightningModule):
    """A gated network of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 32), nn.Linear(4, 32), nn.Linear(32, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0]
        y = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return (y - x).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-2)


class Gated(LoRAMixin, Unadapted):
    pass


def test_a_module_of_ones_own_sets_its_gate_or_lets_it_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = DataLoader(TensorDataset(torch.randn(64, 4)), 32)

    def keeps(module: Any, **options: Any) -> set[bool]:
        fit(module, tmp_path, rows, **options)
        return {layer.lora_keeps_gate for layer in lora_layers(module).values()}

    module = Gated()
    module.lora, module.step_memory = LoRAConfig(rank=2), {"gate": "keep"}
    assert keeps(module) == {True}
    asked = LoRA(LoRAConfig(rank=2), step_memory=StepMemory(gate="keep"))
    assert keeps(Unadapted(), callbacks=[asked]) == {True}
    have(monkeypatch, 10**9)
    module = Gated()
    module.lora = LoRAConfig(rank=2)
    assert keeps(module) == {True}
    have(monkeypatch, 1)
    assert keeps(module) == {False}
    # A module without adapters has nothing to choose.
    callback, _ = fit(Unadapted(), tmp_path, rows)
    assert callback.choice is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_rows": 64}, r"Gated cannot follow head_rows, only gate\. A loss of your own takes head_loss\("),
        ({"gates": "keep"}, r"step_memory has no setting 'gates'; did you mean 'gate'\?"),
        ({"gate": "none"}, "step_memory: gate must be one of auto, keep, recompute, got 'none'"),
        ({"head_rows": 0}, "head_rows must be 'auto' or a number of rows, 1 or more, got 0"),
        ({"activation_checkpointing": "yes"}, "activation_checkpointing must be 'auto', true or false, got 'yes'"),
        (7, "step_memory must be a StepMemory, a mapping or None, got int"),
    ],
)
def test_a_wrong_setting_is_refused(settings: Any, message: str) -> None:
    module = Gated()
    module.lora, module.step_memory = LoRAConfig(rank=2), settings
    with pytest.raises(ConfigError, match=message):
        module.apply_lora()


def test_settings_that_contradict_each_other_are_refused(wide_llama: Path) -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing=True and False in step_memory contradict"):
        made(wide_llama, step_memory={"activation_checkpointing": False}, activation_checkpointing=True)


class Offloaded(Watched):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("memory", [{"gate": "keep"}, {"activation_checkpointing": True}])
def test_tensors_kept_on_the_cpu_give_the_same_gradients(
    memory: dict[str, Any], wide_llama: Path, tmp_path: Path
) -> None:
    """Offloading by torch's hooks, over every layer of ours and the loss at the head."""
    runs = []
    for kind in (Watched, Offloaded):
        torch.manual_seed(0)
        module = kind(str(wide_llama), 1e-3, lora=LoRAConfig(rank=2, dropout=0.2), step_memory=memory)
        fit(module, tmp_path)
        runs.append(module.seen)
    assert len(runs[0]) > 8
    assert all(torch.equal(one, same) for one, same in zip(*runs, strict=True))
