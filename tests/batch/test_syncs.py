"""How often a step waits for the device, and how many operators a measured step adds, counted on CPU tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import masking_utils

from benchmarks.syncs import Alternating, SyncCounter, count, monitored_ratio, of_command
from lightning_lora import LoRAConfig
from lightning_lora.batch_facts import FACTS
from lightning_lora.callbacks import FiniteGradients, LoRAGuard, LoRAProgressBar
from lightning_lora.callbacks.one_reading import OneReading
from lightning_lora.cli.ending import end_of_run
from lightning_lora.data.batches.collate import Collate, CollateEvenly
from lightning_lora.errors import GuardError
from lightning_lora.tasks import CausalLM
from lightning_lora.tasks.attention.mask import is_causal, known_packing
from lightning_lora.tasks.head_loss import head_loss
from tests.support import toys

pytestmark = [pytest.mark.slow, *toys.expected_warnings, *toys.monitor_warnings]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_llama(tmp_path_factory.mktemp("model"))


def rows(num_rows: int, weighted: bool = False) -> list[dict[str, Any]]:
    """Rows of 5 to 9 tokens, of which the first two have no label."""
    made = []
    for n, row in enumerate(toys.token_rows(num_rows)):
        ids = row["input_ids"][: 5 + n % 5].tolist()
        weight = {"weight": 1.0 + n % 2} if weighted else {}
        made.append({"input_ids": ids, "supervised": [place > 1 for place in range(len(ids))], **weight})
    return made


def without_facts(collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    return lambda examples: {name: value for name, value in collate(examples).items() if name != FACTS}


def loader(collate: Callable[[Any], Any], num_rows: int = 24, weighted: bool = False) -> Any:
    return DataLoader(rows(num_rows, weighted), batch_size=2, collate_fn=collate)  # pyright: ignore[reportArgumentType]


def fitted(model: Path, folder: Path, data: Any, callbacks: list[Callback], **options: Any) -> SyncCounter:
    module = CausalLM(str(model), learning_rate=1e-3, lora=LoRAConfig(rank=2))
    return count(module, data, folder, callbacks, max_epochs=1, **options)


@pytest.mark.parametrize(("accumulate", "weighted"), [(1, False), (2, False), (1, True)], ids=str)
def test_a_step_with_all_callbacks_of_fit_waits_for_the_device_at_most_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, weighted: bool
) -> None:
    monkeypatch.setattr(end_of_run, "_SAVE_SECONDS", math.inf)  # the losses are read every half minute too
    data = loader(Collate(0, weighted), 12 * 2 * accumulate, weighted)
    counter = fitted(model, tmp_path, data, of_command(), accumulate_grad_batches=accumulate)
    assert len(counter.by_step) == 12
    # The last step is followed by the adapter that is written. Step 10 prints a line and checks the weights.
    most = {step: [f"{sync.op} {sync.place}" for sync in syncs] for step, syncs in counter.by_step.items() if step < 11}
    assert all(len(syncs) <= 1 for syncs in most.values()), most
    assert all("one_reading.py" in sync for syncs in most.values() for sync in syncs), most


def test_packed_rows_wait_no_more_than_padded_ones(model: Path, tmp_path: Path) -> None:
    counter = fitted(model, tmp_path, loader(CollateEvenly(0)), [FiniteGradients()], enable_progress_bar=False)
    late = {step: syncs for step, syncs in counter.by_step.items() if step}  # `check_packing` reads in the first step
    assert len(late) == 11
    assert all(len(syncs) == 1 for syncs in late.values()), late


def test_batches_without_facts_train_to_the_same_weights(model: Path, tmp_path: Path) -> None:
    ends = []
    for collate in (Collate(0), without_facts(Collate(0))):
        module = CausalLM(str(model), learning_rate=1e-3, lora=LoRAConfig(rank=2))
        torch.manual_seed(0)
        counter = count(module, loader(collate), tmp_path, [], max_epochs=1, enable_progress_bar=False)
        ends.append((toys.snapshot(module), max(len(syncs) for syncs in counter.by_step.values())))
    (known, no_wait), (asked, waits) = ends
    assert no_wait == 0 < waits
    for name, weight in known.items():
        torch.testing.assert_close(weight, asked[name], rtol=1e-5, atol=1e-7)


def test_a_measured_step_takes_at_most_half_of_the_operators_more(model: Path, tmp_path: Path) -> None:
    collate = Collate(0)
    counter = fitted(model, tmp_path, loader(collate), [FiniteGradients(), Alternating()], enable_progress_bar=False)
    assert 1.1 < monitored_ratio(counter) <= 1.5
    # Its own numbers come in one transfer; rows are compared in the first measured steps, and then no more.
    reads = [sync.place for sync in counter.by_step[7] if "noise/" in sync.place]
    assert len(reads) == 1


def test_the_counter_sees_what_waits_and_only_that() -> None:
    counter = SyncCounter()
    counter.step = 0
    device, host = torch.arange(6.0), torch.arange(6.0)
    counter.mark([device])
    with counter:
        made = device * 2 + host
        asked: list[Callable[[], object]] = [
            lambda: made.sum().item(),
            lambda: bool(made.any()),
            made.tolist,
            made.cpu,
            made.nonzero,
            lambda: made[made > 1],
            made.unique,
            lambda: torch.equal(made, host),
            lambda: torch.tensor(1.0, device="cpu"),
        ]
        for number, ask in enumerate(asked, 1):
            ask()
            assert len(counter.syncs) == number
        made[made > 1] = 0.0
        made.index_select(0, torch.zeros(2, dtype=torch.int64))
        assert made.cpu().tolist() == [0.0] * 6
        assert host.sum().item() == 15.0
        assert torch.tensor(2.0).item() == 2.0
    assert len(counter.syncs) == len(asked) + 1


def test_what_callbacks_ask_is_read_in_one_transfer() -> None:
    reading, counter = OneReading(), SyncCounter()
    a, b, c = torch.tensor([1.5, 2.0]), torch.tensor(2**40 + 1), torch.tensor(True)
    counter.mark([a, b, c])
    with counter:
        for name, numbers in {"a": a, "b": b, "c": c}.items():
            reading.ask(name, numbers)
        reading.drop("c")
        assert reading.take("b") == [2**40 + 1]
        assert reading.take("a") == [1.5, 2.0]
        assert reading.take("a") is reading.take("c") is None
    assert len(counter.syncs) == 1


def test_the_loss_at_the_head_asks_nothing_if_the_batch_brings_its_rows() -> None:
    batch = Collate(0)(rows(4))
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    counter, hidden = SyncCounter(), torch.randn(*labels.shape, 6, requires_grad=True)
    weight, found = torch.randn(400, 6), []
    counter.mark([labels, hidden, weight, batch[FACTS].places])
    with counter:
        for facts in (batch[FACTS], None):
            loss = head_loss(hidden, weight, labels, facts=facts)
            found.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
            assert len(counter.syncs) == (0 if facts else 2)
    assert all(torch.equal(known, asked) for known, asked in zip(*found, strict=True))


def test_only_a_model_that_looks_back_needs_no_mask_over_padding() -> None:
    net = nn.Embedding(20, 4)
    assert is_causal(net, lambda ids: net(ids).cumsum(1), 20)
    assert not is_causal(net, lambda ids: net(ids) + net(ids).mean(1, keepdim=True), 20)


def test_transformers_is_told_what_it_would_have_found() -> None:
    asks = masking_utils.find_packed_sequence_indices
    positions = CollateEvenly(0)(rows(4))["position_ids"]
    found = asks(positions)
    assert found is not None
    with known_packing(packed=True):
        torch.testing.assert_close(masking_utils.find_packed_sequence_indices(positions), found, rtol=0, atol=0)
    with known_packing(packed=False):
        assert masking_utils.find_packed_sequence_indices(torch.arange(4)[None]) is None
    assert masking_utils.find_packed_sequence_indices is asks


def test_facts_of_other_rows_are_not_used() -> None:
    batch = Collate(0)(rows(4))
    facts, labels = batch[FACTS], batch["labels"]
    assert facts.fit(labels)
    assert facts.count == int((labels[:, 1:] != -100).sum())
    assert facts.labels == (int(labels[labels >= 0].min()), int(labels.max()))
    assert not facts.fit(labels[:2])
    assert not facts.to("meta").fit(labels)


def test_guards_still_find_their_faults_a_step_later(model: Path, tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                with torch.no_grad():
                    next(p for p in pl_module.parameters() if p.requires_grad)[0, 0] = torch.nan

    with pytest.raises(GuardError, match="NaN or infinite after optimizer step 2"):
        fitted(model, tmp_path, loader(Collate(0)), [Breaks(), LoRAGuard(patience=2)], enable_progress_bar=False)


def test_the_bar_shows_the_numbers_of_its_own_step(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses: dict[int, Tensor] = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses[trainer.global_step] = trainer.callback_metrics["train_loss"]

    bar = LoRAProgressBar(every_n_steps=5)
    fitted(model, tmp_path, loader(Collate(0)), [FiniteGradients(), bar, Keep()])
    shown = capsys.readouterr().out
    for step in (5, 10, 12):
        assert f"step {step}  loss {float(losses[step]):.4g} " in shown
