"""What a step keeps to be faster is chosen by its traces and the room of the device, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import DataLoader, default_collate

from lightning_lora import LoRAConfig, StepMemory, lora_layers
from lightning_lora.callbacks.memory import memory_choice
from lightning_lora.memory import run_step
from lightning_lora.memory.candidates import MARGIN
from lightning_lora.memory.other_settings import could_recompute
from lightning_lora.mixin.memory_settings import choices_of
from lightning_lora.tasks import CausalLM
from tests.callbacks.memory.wide_llama import OPEN, Watched, bytes_of, fit, have, made, ways
from tests.support import toys

pytestmark = [
    pytest.mark.slow,
    *toys.expected_warnings,
    *toys.monitor_warnings,
    pytest.mark.usefixtures("short_chunks"),
]


def test_candidates_take_less_from_one_to_the_next(wide_llama: Path) -> None:
    found = bytes_of(wide_llama)
    assert len(found) == 7
    assert found == sorted(set(found), reverse=True)


@pytest.mark.parametrize("place", [0, 3, 5, 6])
def test_the_fastest_that_fits_is_taken_and_told(
    place: int, wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    traced = bytes_of(wide_llama)
    # What holds more than it must leaves a tenth free; how a run trains without a choice may fill the device.
    room = {5: traced[5], 6: traced[5] - 1}.get(place, int(traced[place] / (1 - MARGIN)) + 1)
    have(monkeypatch, room)
    module = made(wide_llama)
    callback, _ = fit(module, tmp_path)
    expected = ways()[place]
    assert callback.choice is not None
    assert (callback.choice.memory, callback.choice.traced.total) == (expected, traced[place])
    assert choices_of(module) == expected
    assert {layer.lora_keeps_gate for layer in lora_layers(module).values()} == {expected.gate == "keep"}
    assert could_recompute(module.model) is not expected.activation_checkpointing
    (line,) = [line for line in caplog.messages if line.startswith("step memory: ")]
    told = f"takes {run_step.gigabytes(traced[place])}, and the device has {run_step.gigabytes(room)} for it"
    assert line == f"step memory: {expected}, the fastest that fits: a traced step of 8 rows {told}"


def test_no_choice_changes_losses_or_gradients_beyond_the_rounding_of_chunks(
    wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout and initialisation draw the same numbers; the traces draw none."""
    seen, traced = {}, bytes_of(wide_llama)
    lora = LoRAConfig(rank=2, dropout=0.2)
    for room in (None, traced[5], traced[5] - 1, 10**9):
        torch.manual_seed(0)
        module = made(wide_llama, lora=lora)
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


def test_a_cpu_is_not_asked_and_nothing_is_traced(
    wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_step, "StepTracer", None)  # a call would fail
    module = made(wide_llama)
    callback, trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert callback.choice is None
    assert choices_of(module) == OPEN
    assert "MemoryChoice" not in torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]


def test_a_step_that_cannot_be_traced_trains_as_without_a_choice(
    wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Strange(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if isinstance(loss, FakeTensor):
                raise RuntimeError("no values here")
            return loss

    have(monkeypatch, 10**9)
    module = Strange(str(wide_llama), 1e-3, lora=LoRAConfig(rank=2))
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
    wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    traced = bytes_of(wide_llama)
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
    fit(Seen(str(wide_llama), 1e-3, lora=LoRAConfig(rank=2)), tmp_path, loader)
    assert looked[:2] == [10, 14]
    assert len(looked) <= 3
    places = [ways().index(each) for each in at]
    assert places[:2] == [0, 0]
    assert places[2] > 0
    assert places[3] == places[2]  # never raised again
    assert places[4:] == [6, 6]
    lines = [line for line in caplog.messages if line.startswith("step memory: ")]
    assert ["lowered for a larger batch" in line for line in lines] == [False, True, True]


def test_a_batch_that_surely_fits_is_not_traced(
    wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    real = memory_choice._traces
    monkeypatch.setattr(memory_choice, "_traces", lambda *a: looked.append(1) or real(*a))
    have(monkeypatch, 100 * bytes_of(wide_llama)[0])
    fit(made(wide_llama), tmp_path, batches(10, 20, 40))
    assert looked == [1]


def test_a_resumed_run_keeps_its_choice_and_its_bits(
    wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = bytes_of(wide_llama)
    have(monkeypatch, int(traced[1] / (1 - MARGIN)) + 1)
    whole = made(wide_llama)
    torch.manual_seed(0)
    fit(whole, tmp_path / "whole", max_epochs=2)
    torch.manual_seed(0)
    callback, trainer = fit(made(wide_llama), tmp_path / "first", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    assert callback.choice is not None
    assert callback.choice.place == 1
    # The device has more room by then; and later less, but not too little.
    for room in (10**9, traced[1]):
        have(monkeypatch, room)
        resumed = made(wide_llama)
        fit(resumed, tmp_path / "second", max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
        assert choices_of(resumed) == callback.choice.memory
        rest = whole.seen[len(whole.seen) - len(resumed.seen) :]
        assert len(rest) > 8
        assert all(torch.equal(one, same) for one, same in zip(rest, resumed.seen, strict=True))
    have(monkeypatch, traced[1] - 1)
    resumed = made(wide_llama)
    fit(resumed, tmp_path / "second", max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert ways().index(choices_of(resumed)) > 1
    # Without the callback, and in a module that is loaded: as the settings say.
    again = CausalLM.load_from_checkpoint(tmp_path / "first.ckpt", weights_only=True)
    assert choices_of(again) == OPEN


def test_a_second_fit_chooses_anew(wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, traced = made(wide_llama), bytes_of(wide_llama)
    have(monkeypatch, traced[5] - 1)
    fit(module, tmp_path)
    assert choices_of(module).activation_checkpointing is True
    have(monkeypatch, 10**9)
    fit(module, tmp_path)
    assert choices_of(module) == StepMemory("keep", 64, False)
    assert could_recompute(module.model)


TWO = """
import sys, torch
from pathlib import Path
from lightning_lora import LoRAConfig
from lightning_lora.callbacks import MemoryChoice
from lightning_lora.callbacks.memory import memory_choice
from lightning_lora.memory import candidates
from lightning_lora.memory.room import Room
from lightning_lora.mixin.memory_settings import choices_of
from lightning_lora.tasks import CausalLM
from tests.support import toys
from tests.tasks.conftest import token_loader

candidates.HEAD_ROWS = 64, 32, 8
rooms = [int(number) for number in sys.argv[3:]]
memory_choice._room = lambda trainer, module: Room(rooms[trainer.global_rank], True)
module, callback = CausalLM(sys.argv[1], 1e-3, lora=LoRAConfig(rank=2)), MemoryChoice()
trainer = toys.trainer(Path(sys.argv[2]), callbacks=[callback], devices=2, strategy="ddp", max_epochs=1)
trainer.fit(module, token_loader(8, 32))
Path(sys.argv[2], f"choice{trainer.global_rank}").write_text(repr(choices_of(module)))
"""


def test_both_ranks_take_the_choice_of_the_one_with_less_room(wide_llama: Path, tmp_path: Path) -> None:
    room = int(bytes_of(wide_llama)[3] / (1 - MARGIN)) + 1
    toys.run_python(TWO, wide_llama, tmp_path, 10**9, room, ranks=2)
    chosen = {(tmp_path / f"choice{rank}").read_text() for rank in range(2)}
    assert chosen == {repr(ways()[3])}
