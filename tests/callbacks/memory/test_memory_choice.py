"""What a step keeps to be faster is chosen by its traces and the room of the device, and nothing else changes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_lora import ConfigError, LoRAConfig, LoRAMixin, StepMemory, lora_layers
from lightning_lora.callbacks import LoRA, MemoryChoice
from lightning_lora.callbacks.memory import memory_choice
from lightning_lora.memory import choice, run_step
from lightning_lora.memory.choice import MARGIN, candidates
from lightning_lora.memory.other_settings import could_recompute
from lightning_lora.memory.room import Room
from lightning_lora.memory.step_trace import trace_step
from lightning_lora.mixin.step_choices import choices_of
from lightning_lora.tasks import CausalLM
from tests.support import toys
from tests.support.monitored import Samples
from tests.tasks.conftest import token_loader

pytestmark = [*toys.expected_warnings, *toys.monitor_warnings]
OPEN = StepMemory()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_llama(tmp_path_factory.mktemp("wide") / "llama", num_hidden_layers=3, intermediate_size=96)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of a test have fewer rows than the chunks of a run."""
    monkeypatch.setattr(choice, "HEAD_ROWS", (64, 32, 8))
    monkeypatch.setattr(run_step, "SECONDS", 600.0)


def have(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let the device be one that tells how much memory it has for a step."""
    monkeypatch.setattr(memory_choice, "_room", lambda *_: Room(num_bytes, is_limit=True))


class Watched(CausalLM):
    """Keeps the losses and gradients of its steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not isinstance(loss, FakeTensor):
            self.seen.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        if not isinstance(next(self.parameters()), FakeTensor):
            self.seen += [p.grad.clone() for p in self.parameters() if p.grad is not None]


def made(folder: Path, **options: Any) -> Watched:
    return Watched(str(folder), 1e-3, **({"lora": LoRAConfig(rank=2)} | options))


def fit(module: Any, where: Path, loader: Any = None, **options: Any) -> tuple[MemoryChoice, Trainer]:
    callback, ckpt_path = MemoryChoice(), options.pop("ckpt_path", None)
    more = options.pop("callbacks", [])
    trainer = toys.trainer(where, callbacks=[callback, *more], **({"max_epochs": 1} | options))
    trainer.fit(module, loader or token_loader(8, 16), ckpt_path=ckpt_path, weights_only=True)
    return callback, trainer


@functools.cache
def bytes_of(folder: Path) -> list[int]:
    """What a step of 8 rows takes with each candidate."""
    batch = next(iter(token_loader(8)))
    ways = candidates(OPEN, CausalLM.step_memory_choices)
    return [trace_step(made(folder, step_memory=each), batch).memory.total for each in ways]


def test_candidates_take_less_from_one_to_the_next(folder: Path) -> None:
    found = bytes_of(folder)
    assert len(found) == 7
    assert found == sorted(set(found), reverse=True)


@pytest.mark.parametrize("place", [0, 3, 5, 6])
def test_the_fastest_that_fits_is_taken_and_told(
    place: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    traced = bytes_of(folder)
    # What holds more than it must leaves a tenth free; how a run trains without a choice may fill the device.
    room = {5: traced[5], 6: traced[5] - 1}.get(place, int(traced[place] / (1 - MARGIN)) + 1)
    have(monkeypatch, room)
    module = made(folder)
    callback, _ = fit(module, tmp_path)
    expected = candidates(OPEN, CausalLM.step_memory_choices)[place]
    assert callback.choice is not None
    assert (callback.choice.memory, callback.choice.traced.total) == (expected, traced[place])
    assert choices_of(module) == expected
    assert {layer.lora_keeps_gate for layer in lora_layers(module).values()} == {expected.gate == "keep"}
    assert could_recompute(module.model) is not expected.activation_checkpointing
    (line,) = [line for line in caplog.messages if line.startswith("step memory: ")]
    told = f"takes {run_step.gigabytes(traced[place])}, and the device has {run_step.gigabytes(room)} for it"
    assert line == f"step memory: {expected}, the fastest that fits: a traced step of 8 rows {told}"


def test_no_choice_changes_losses_or_gradients_beyond_the_rounding_of_chunks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout and initialisation draw the same numbers; the traces draw none."""
    seen, traced = {}, bytes_of(folder)
    lora = LoRAConfig(rank=2, dropout=0.2)
    for room in (None, traced[5], traced[5] - 1, 10**9):
        torch.manual_seed(0)
        module = made(folder, lora=lora)
        if room is not None:
            have(monkeypatch, room)
        callback, _ = fit(module, tmp_path)
        assert (callback.choice is None) is (room is None)
        seen[room] = module.seen, torch.get_rng_state()
    (plain, state), *others = seen.values()
    assert len(plain) > 8
    for (found, other), is_exact in zip(others, (False, False, False), strict=True):
        assert torch.equal(state, other)
        for one, same in zip(plain, found, strict=True):
            torch.testing.assert_close(same, one, rtol=0 if is_exact else 1e-4, atol=0 if is_exact else 1e-7)


@pytest.mark.parametrize("other", [{"gate": "keep"}, {"activation_checkpointing": True}])
def test_kept_gates_and_checkpointed_blocks_give_the_same_bits(
    other: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    runs = []
    for memory in ({}, other):
        torch.manual_seed(0)
        module = made(folder, lora=LoRAConfig(rank=2, dropout=0.2), step_memory=memory)
        fit(module, tmp_path)
        runs.append(module.seen)
    assert len(runs[0]) > 8
    assert all(torch.equal(one, same) for one, same in zip(*runs, strict=True))


def test_a_cpu_is_not_asked_and_nothing_is_traced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_step, "StepTracer", None)  # a call would fail
    module = made(folder)
    callback, trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert callback.choice is None
    assert choices_of(module) == OPEN
    assert "MemoryChoice" not in torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]


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
    settings: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, 1)
    module = made(folder, **settings)
    fit(module, tmp_path)
    asked = StepMemory.from_dict(settings.get("step_memory")).with_checkpointing(False)
    used = choices_of(module)
    assert used.activation_checkpointing is False
    assert used.gate == ("keep" if asked.gate == "keep" else "recompute")
    assert used.head_rows == (8 if asked.head_rows == "auto" else asked.head_rows)
    assert could_recompute(module.model)


def test_a_step_that_cannot_be_traced_trains_as_without_a_choice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Strange(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if isinstance(loss, FakeTensor):
                raise RuntimeError("no values here")
            return loss

    have(monkeypatch, 10**9)
    module = Strange(str(folder), 1e-3, lora=LoRAConfig(rank=2))
    callback, _ = fit(module, tmp_path)
    assert callback.choice is None
    assert choices_of(module) == OPEN
    (line,) = [line for line in caplog.messages if line.startswith("step memory: ")]
    assert line.startswith("step memory: nothing is chosen, for a training step of Strange cannot be traced")
    assert "no values here" in line


def batches(*lengths: int) -> Any:
    """A loader of batches of 8 rows, whose lengths differ."""
    made: Any = [default_collate(toys.token_rows(8, length)) for length in lengths]
    return DataLoader(made, batch_size=None)


def test_a_larger_batch_is_traced_before_it_is_trained_on_and_lowers_the_choice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    traced = bytes_of(folder)
    have(monkeypatch, int(traced[0] / (1 - MARGIN)) + 1)
    looked: list[int] = []
    real = memory_choice._traces
    monkeypatch.setattr(memory_choice, "_traces", lambda *a: looked.append(a[2]["input_ids"].shape[1]) or real(*a))
    at: list[StepMemory] = []

    class Seen(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not isinstance(next(self.parameters()), FakeTensor):
                at.append(choices_of(self))
            return super().training_step(batch, batch_idx)

    loader = batches(10, 4, 14, 10, 40, 40)
    fit(Seen(str(folder), 1e-3, lora=LoRAConfig(rank=2)), tmp_path, loader)
    assert looked[:2] == [10, 14]
    assert len(looked) <= 3
    places = [candidates(OPEN, CausalLM.step_memory_choices).index(each) for each in at]
    assert places[:2] == [0, 0]
    assert places[2] > 0
    assert places[3] == places[2]  # never raised again
    assert places[4:] == [6, 6]
    lines = [line for line in caplog.messages if line.startswith("step memory: ")]
    assert ["lowered for a larger batch" in line for line in lines] == [False, True, True]


def test_a_batch_that_surely_fits_is_not_traced(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = memory_choice._traces
    monkeypatch.setattr(memory_choice, "_traces", lambda *a: looked.append(1) or real(*a))
    have(monkeypatch, 100 * bytes_of(folder)[0])
    fit(made(folder), tmp_path, batches(10, 20, 40))
    assert looked == [1]


def test_a_resumed_run_keeps_its_choice_and_its_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = bytes_of(folder)
    have(monkeypatch, int(traced[1] / (1 - MARGIN)) + 1)
    whole = made(folder)
    torch.manual_seed(0)
    fit(whole, tmp_path / "whole", max_epochs=2)
    torch.manual_seed(0)
    callback, trainer = fit(made(folder), tmp_path / "first", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    assert callback.choice is not None
    assert callback.choice.place == 1
    # The device has more room by then; and later less, but not too little.
    for room in (10**9, traced[1]):
        have(monkeypatch, room)
        resumed = made(folder)
        fit(resumed, tmp_path / "second", max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
        assert choices_of(resumed) == callback.choice.memory
        rest = whole.seen[len(whole.seen) - len(resumed.seen) :]
        assert len(rest) > 8
        assert all(torch.equal(one, same) for one, same in zip(rest, resumed.seen, strict=True))
    have(monkeypatch, traced[1] - 1)
    resumed = made(folder)
    fit(resumed, tmp_path / "second", max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert candidates(OPEN, CausalLM.step_memory_choices).index(choices_of(resumed)) > 1
    # Without the callback, and in a module that is loaded: as the settings say.
    again = CausalLM.load_from_checkpoint(tmp_path / "first.ckpt", weights_only=True)
    assert choices_of(again) == OPEN


def test_a_second_fit_chooses_anew(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, traced = made(folder), bytes_of(folder)
    have(monkeypatch, traced[5] - 1)
    fit(module, tmp_path)
    assert choices_of(module).activation_checkpointing is True
    have(monkeypatch, 10**9)
    fit(module, tmp_path)
    assert choices_of(module) == StepMemory("keep", 64, False)
    assert could_recompute(module.model)


def test_blocks_are_not_computed_again_beside_a_monitor_of_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, 1)
    module = made(folder)
    fit(module, tmp_path, callbacks=[Samples()])
    assert choices_of(module) == StepMemory("recompute", 8, False)


def test_a_monitor_of_rows_measures_the_same_with_kept_gates(folder: Path, tmp_path: Path) -> None:
    found = []
    for gate in ("recompute", "keep"):
        torch.manual_seed(0)
        fit(made(folder, step_memory={"gate": gate}), tmp_path, callbacks=[monitor := Samples()])
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


def test_settings_that_contradict_each_other_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing=True and False in step_memory contradict"):
        made(folder, step_memory={"activation_checkpointing": False}, activation_checkpointing=True)


TWO = """
import sys, torch
from pathlib import Path
from lightning_lora import LoRAConfig
from lightning_lora.callbacks import MemoryChoice
from lightning_lora.callbacks.memory import memory_choice
from lightning_lora.memory import choice
from lightning_lora.memory.room import Room
from lightning_lora.mixin.step_choices import choices_of
from lightning_lora.tasks import CausalLM
from tests.support import toys
from tests.tasks.conftest import token_loader

choice.HEAD_ROWS = 64, 32, 8
rooms = [int(number) for number in sys.argv[3:]]
memory_choice._room = lambda trainer, module: Room(rooms[trainer.global_rank], True)
module, callback = CausalLM(sys.argv[1], 1e-3, lora=LoRAConfig(rank=2)), MemoryChoice()
trainer = toys.trainer(Path(sys.argv[2]), callbacks=[callback], devices=2, strategy="ddp", max_epochs=1)
trainer.fit(module, token_loader(8, 32))
Path(sys.argv[2], f"choice{trainer.global_rank}").write_text(repr(choices_of(module)))
"""


def test_both_ranks_take_the_choice_of_the_one_with_less_room(folder: Path, tmp_path: Path) -> None:
    room = int(bytes_of(folder)[3] / (1 - MARGIN)) + 1
    toys.run_python(TWO, folder, tmp_path, 10**9, room, ranks=2)
    chosen = {(tmp_path / f"choice{rank}").read_text() for rank in range(2)}
    assert chosen == {repr(candidates(OPEN, CausalLM.step_memory_choices)[3])}


class Offloaded(Watched):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("memory", [{"gate": "keep"}, {"activation_checkpointing": True}])
def test_tensors_kept_on_the_cpu_give_the_same_gradients(memory: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Offloading by torch's hooks, over every layer of ours and the loss at the head."""
    runs = []
    for kind in (Watched, Offloaded):
        torch.manual_seed(0)
        module = kind(str(folder), 1e-3, lora=LoRAConfig(rank=2, dropout=0.2), step_memory=memory)
        fit(module, tmp_path)
        runs.append(module.seen)
    assert len(runs[0]) > 8
    assert all(torch.equal(one, same) for one, same in zip(*runs, strict=True))
