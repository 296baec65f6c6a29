"""A step holds nothing that a CUDA graph cannot capture, shown on CPU tensors that stand for those of a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.capture import CaptureCounter, captured
from benchmarks.contenders import loss_at_head
from benchmarks.syncs import count, of_command
from benchmarks.workloads import IGNORED, Batch, next_token_loss
from lightning_lora import LoRAConfig
from lightning_lora.batch_facts import BatchFacts
from lightning_lora.data.batches.collate import Collate, CollateEvenly
from lightning_lora.data.preferences.collate import CollatePairs
from lightning_lora.lora.functional import expert_rows, linear_products
from lightning_lora.tasks import DPO, CausalLM
from lightning_lora.tasks.attention.mask import known_packing
from tests.support import tiny_models, toys
from tests.support.moe_models import moe

pytestmark = [pytest.mark.slow, *toys.expected_warnings, *toys.monitor_warnings]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_llama(tmp_path_factory.mktemp("model"))


def rows(collate: Any = None) -> Any:
    """Rows of 8 tokens, of which the first two have no label."""
    made: Any = [
        {"input_ids": row["input_ids"][:8].tolist(), "supervised": [False] * 2 + [True] * 6}
        for row in toys.token_rows()
    ]
    return DataLoader(made, batch_size=2, collate_fn=collate or Collate(0))


def pairs() -> Any:
    """Pairs of rows of 8 tokens with one prompt of 4."""
    made: Any = []
    for row in toys.token_rows():
        ids = row["input_ids"].tolist()
        sides = ids[:8], ids[:4] + ids[6:10]
        made.append([{"input_ids": side, "supervised": [False] * 4 + [True] * 4} for side in sides])
    return DataLoader(made, batch_size=2, collate_fn=CollatePairs(0))


def last_step(module: LightningModule, data: Any, folder: Path, callbacks: Any = ()) -> list[str]:
    """What cannot be captured in the last of four steps."""
    options = {} if callbacks else {"enable_progress_bar": False}
    with captured():
        counter = count(module, data, folder, callbacks, CaptureCounter(), max_steps=4, **options)
    assert counter.num_ops[3] > 100
    return [f"{sync.op} {sync.place}" for sync in counter.by_step[3]]


def language_model(model: Path, **lora: Any) -> CausalLM:
    return CausalLM(str(model), learning_rate=1e-3, lora=LoRAConfig(rank=2, **lora))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_of_a_language_model_can_be_captured(model: Path, tmp_path: Path, dropout: float) -> None:
    assert last_step(language_model(model, dropout=dropout), rows(), tmp_path) == []


def test_the_callbacks_of_fit_read_once_before_the_optimizer(model: Path, tmp_path: Path) -> None:
    (read,) = last_step(language_model(model), rows(), tmp_path, of_command())
    assert "one_reading.py" in read


def test_a_step_of_preferences_can_be_captured(model: Path, tmp_path: Path) -> None:
    module = DPO(str(model), learning_rate=1e-3, lora=LoRAConfig(rank=2))
    assert last_step(module, pairs(), tmp_path) == []


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_of_grouped_experts_can_be_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    monkeypatch.setattr(expert_rows, "grouping_pays", lambda x, weights: True)
    model: Any = moe("qwen3_moe", hidden_size=32, moe_intermediate_size=32, num_experts=4, vocab_size=400)
    model.save_pretrained(tmp_path / "model")
    module = language_model(tmp_path / "model", targets=["*_proj", "*.experts"], dropout=dropout)
    # Packed rows have no mask over padding, which transformers would look at for a model that is not causal to the bit.
    assert last_step(module, rows(CollateEvenly(0)), tmp_path) == []


def test_each_operator_that_is_broken_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault with the operator it puts into a step."""

    def found() -> list[str]:
        return [
            each.partition(" lightning")[0] for each in last_step(language_model(model, dropout=0.1), rows(), tmp_path)
        ]

    def after(function: Any, fault: Callable[[Tensor], object]) -> Any:
        def broken(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = function(x, *args, **kwargs)
            fault(x)
            return result

        return broken

    host = torch.arange(4)
    faults: dict[str, Callable[[Tensor], object]] = {
        "_local_scalar_dense": lambda x: x.sum().item(),
        "nonzero": lambda x: x.nonzero(),
        "index": lambda x: x[x > 0],
        "add.Tensor of a host tensor": lambda x: x[..., :4] + host,
        "rand on the host": lambda x: torch.rand(()),
    }
    for name, fault in faults.items():
        with monkeypatch.context() as patch:
            patch.setattr(linear_products, "scaled_inner", after(linear_products.scaled_inner, fault))
            assert any(name in each for each in found()), name


def test_the_measured_loss_at_the_head_can_be_captured_with_facts_and_is_the_usual_loss() -> None:
    net, ids = tiny_models.llama(use_cache=False), torch.arange(12).view(2, 6) + 3
    batch = Batch(ids, ids.masked_fill(torch.arange(6) < 2, IGNORED))
    facts, counter = BatchFacts.of(batch.labels, None, IGNORED), CaptureCounter()
    counter.mark([*net.parameters(), *net.buffers(), ids, batch.labels, facts.places])
    counter.step = 0
    with counter, known_packing(packed=False):
        loss = loss_at_head(net, batch, facts=facts)
        assert counter.syncs == []
        assert loss_at_head(net, batch).item() == pytest.approx(loss.item(), rel=1e-6)
    assert len(counter.syncs) > 2
    assert next_token_loss(net, batch).item() == pytest.approx(loss.item(), rel=1e-6)


def test_dropout_as_outside_of_a_graph_is_found(model: Path, tmp_path: Path) -> None:
    module = language_model(model, dropout=0.1)
    counter = count(module, rows(), tmp_path, (), CaptureCounter(), max_steps=4, enable_progress_bar=False)
    assert {sync.op for sync in counter.by_step[3]} == {
        "randint on the host",
        "random_.from by a generator of its own",
    }
