"""A traced step takes the memory that a real one takes, and leaves the module alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import nn

from benchmarks import memory_prediction
from lightning_lora import LoRAConfig
from lightning_lora.memory.building import built_without_memory
from lightning_lora.memory.step_trace import trace_step
from lightning_lora.tasks import CausalLM
from lightning_lora.tasks.variants import variant
from tests.support import toys
from tests.support.tiny_models import portrait

pytestmark = toys.expected_warnings
TOKENS = torch.arange(128).reshape(4, 32) % 50
BATCH = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, memory_prediction.Case]:
    return memory_prediction.cases(memory_prediction.folders(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toys.save_llama(tmp_path_factory.mktemp("llama")))


FAST = ("lora", "cnn-lora")
SLOW = (
    *("full", "full-clip-accumulate", "lora-dropout", "packed", "checkpointed", "nf4", "amp-lora", "amp-full"),
    *("moe-lora", "moe-full", "encoder-lora", "encoder-full", "cnn-full"),
)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_predicted_memory_is_the_measured_one(name: str, cases: dict[str, Any]) -> None:
    if name == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    found = memory_prediction.compare(name, cases[name])
    assert -0.02 <= found.error <= 0.05


def test_an_untouched_module_and_random_state(llama: str) -> None:
    module = toys.Toy()
    module.configure_model()
    batch = next(iter(toys.loader()))
    before, state = portrait(module), torch.get_rng_state()
    kept = copy.deepcopy(batch)
    trace_step(module, batch)
    assert portrait(module) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(batch, kept, strict=True))
    task = CausalLM(llama, lora={"rank": 2})
    trace_step(task, BATCH)
    assert task.model is None


def test_a_trace_does_not_need_weights(llama: str, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(llama) / name).read_bytes())
    assert trace_step(CausalLM(str(tmp_path), lora={"rank": 2}), BATCH) == trace_step(
        CausalLM(llama, lora={"rank": 2}), BATCH
    )


def test_the_parts_of_a_step_are_what_their_names_say(llama: str) -> None:
    module = CausalLM(llama, lora={"rank": 2})
    module.configure_model()
    adapters = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in module.parameters()) - adapters
    memory = trace_step(module, BATCH).memory
    assert memory.adapters == adapters
    assert weights <= memory.weights <= weights + 2000  # buffers
    assert 2 * adapters <= memory.optimizer <= 2 * adapters + 4 * len(list(module.parameters()))
    assert 0 < memory.gradients <= adapters
    assert memory.logits > 0
    assert memory.total == sum(memory.to_dict()[name] for name in memory.to_dict() if name != "total")


def test_full_fine_tuning_costs_three_products_and_lora_about_two(llama: str) -> None:
    full = CausalLM(llama)
    full.configure_model()
    assert full.model is not None
    matrices = sum(p.numel() for n, p in full.named_parameters() if p.ndim == 2 and "embed" not in n)
    head = cast(Any, full.model.get_output_embeddings()).weight
    if head is cast(Any, full.model.get_input_embeddings()).weight:
        matrices += head.numel()
    found = trace_step(full, BATCH).flops
    assert found >= 6 * matrices * 4 * 31
    # Attention and the products of the last token are small beside.
    assert found <= 1.25 * 6 * matrices * 4 * 32
    ratio = trace_step(CausalLM(llama, lora={"rank": 1}), BATCH).flops / found
    assert 0.6 < ratio < 0.8


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed", "64-true"])
def test_every_precision_is_traced(precision: Any, llama: str) -> None:
    module = CausalLM(llama, lora={"rank": 2})
    memory = trace_step(module, BATCH, precision=precision).memory
    plain = trace_step(module, BATCH).memory
    factor = 2.0 if precision == "64-true" else 0.5
    assert memory.weights == pytest.approx(factor * plain.weights, rel=0.02)


def test_accumulated_gradients_stay_through_the_backward_pass(llama: str) -> None:
    one = trace_step(CausalLM(llama), BATCH).memory
    four = trace_step(CausalLM(llama), BATCH, accumulate_grad_batches=4).memory
    assert four.gradients == max(four.gradients, one.gradients)
    assert four.total >= one.total


def test_a_plain_module_and_variants_of_it() -> None:
    module, batch = toys.Plain(), next(iter(toys.loader()))
    before = portrait(module)
    full, lora = trace_step(variant(module, None), batch), trace_step(variant(module, LoRAConfig(rank=2)), batch)
    assert full == trace_step(module, batch)
    assert lora.memory.adapters == 4 * 2 * ((4 + 8) + (8 + 2))
    assert lora.memory.weights == full.memory.weights
    assert portrait(module) == before


def test_variants_of_a_task_keep_its_other_settings(llama: str) -> None:
    task = CausalLM(llama, learning_rate=1e-3, dtype="bfloat16", lora={"rank": 2})
    full = variant(task, None)
    assert isinstance(full, CausalLM)
    assert full.lora is None
    assert (full.learning_rate, full.dtype_name) == (1e-3, "bfloat16")
    other = variant(full, LoRAConfig(rank=4))
    assert other.lora is not None
    assert other.lora.rank == 4  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="quantization='nf4' loads the base of CausalLM"):
        variant(toys.Plain(), None, "nf4")


def test_a_module_built_without_memory_has_shapes_only(llama: str) -> None:
    with built_without_memory(CausalLM(llama, lora={"rank": 2})) as built:
        names = {name: tuple(p.shape) for name, p in built.named_parameters()}
        assert all(type(p).__name__ == "FakeTensor" for p in built.parameters())
    real = CausalLM(llama, lora={"rank": 2})
    real.configure_model()
    assert names == {name: tuple(p.shape) for name, p in real.named_parameters()}


class Chooses(toys.Plain):
    """Code that depends on values which a trace does not have."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if loss.item() > 0 else loss * 0


def test_a_step_that_reads_numbers_is_traced_with_made_up_ones() -> None:
    batch = next(iter(toys.loader()))
    assert trace_step(Chooses(), batch).memory.total > 0


def test_a_trace_leaves_no_mask_for_the_next_run() -> None:
    layer = nn.Linear(4, 4)
    assert layer(torch.ones(1, 4)).shape == (1, 4)
    lora = LoRAConfig(rank=2, dropout=0.5)
    batch = next(iter(toys.loader()))
    torch.manual_seed(0)
    module = variant(toys.Plain(), lora)
    module.configure_model()
    expected = cast(Any, module.training_step(batch, 0)).item()
    torch.manual_seed(0)
    again = variant(toys.Plain(), lora)
    again.configure_model()
    trace_step(again, batch)
    assert cast(Any, again.training_step(batch, 0)).item() == expected


class Hooked(toys.Plain):
    """Counts what is called, and has a parameter that no loss depends on."""

    calls: ClassVar[list[str]] = []

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(1000))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls.append("step")
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.calls.append("gradients")

    def backward(self, *arguments: Any, **options: Any) -> None:
        self.calls.append("backward")
        super().backward(*arguments, **options)


def test_a_step_is_traced_once_after_a_look_around_and_idle_parameters_take_no_state() -> None:
    batch = next(iter(toys.loader()))
    Hooked.calls.clear()
    found = trace_step(Hooked(), batch).memory
    assert Hooked.calls == ["step", "step", "backward", "gradients"]
    assert found.optimizer < 4 * 1000
    assert found.gradients < 4 * 1000
