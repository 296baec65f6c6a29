"""Operations are those that run, files have the size that was told, and a time says where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaModel

from lightning_lora import LoRAConfig
from lightning_lora.memory.building import built_without_memory
from lightning_lora.memory.parts import MemoryParts
from lightning_lora.memory.step_trace import trace_step
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.planning.cost import (
    TABLE,
    Disk,
    Flops,
    Parameters,
    RunWork,
    StepWork,
    compute_dtype,
    seconds_from_table,
)
from lightning_lora.planning.devices import Device, find_devices
from lightning_lora.planning.timing.shapes import Shape, Validation, Work
from lightning_lora.tasks import CausalLM, SequenceClassifier
from tests.support import toys

pytestmark = toys.expected_warnings

# hidden_size, intermediate_size, num_attention_heads, num_key_value_heads of Llama-3.1-8B and Llama-3.2-1B
SHAPES = {"8B": (4096, 14336, 32, 8), "1B": (2048, 8192, 32, 8)}
TOKENS = 64
# (2 di do + 3 r (di + do)) / (3 di do) over the linear layers of a block
PUBLISHED = {
    "8B": {1: 0.667, 32: 0.679, 128: 0.715, 256: 0.763, 512: 0.859},
    "1B": {32: 0.690, 128: 0.759, 256: 0.852, 512: 1.037},
}


class Blocks(LoRAMixin, LightningModule):
    """The blocks of a Llama, without output layer; the gradient of their input is asked for, as below other blocks."""

    def __init__(self, name: str, lora: LoRAConfig | None, checkpointing: bool = False) -> None:
        super().__init__()
        self.name, self.lora, self.checkpointing = name, lora, checkpointing

    def configure_model(self) -> None:
        width, inner, heads, kv_heads = SHAPES[self.name]
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            num_hidden_layers=1,
            vocab_size=8,
        )
        self.model = LlamaModel(config)
        if self.checkpointing:
            self.model.gradient_checkpointing_enable()
        super().configure_model()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        embedded = self.model.embed_tokens(batch).detach().requires_grad_()
        return self.model(inputs_embeds=embedded).last_hidden_state.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def flops(name: str, rank: int | None, checkpointing: bool = False) -> int:
    module = Blocks(name, LoRAConfig(rank=rank) if rank else None, checkpointing)
    return trace_step(module, torch.zeros(1, TOKENS, dtype=torch.long)).flops


@pytest.fixture(scope="module")
def full() -> dict[str, int]:
    return {name: flops(name, None) for name in SHAPES}


@pytest.mark.parametrize(("name", "rank"), [(name, rank) for name in PUBLISHED for rank in PUBLISHED[name]])
def test_counted_operations_have_the_published_ratio(name: str, rank: int, full: dict[str, int]) -> None:
    assert Flops(flops(name, rank), full[name]).ratio == pytest.approx(PUBLISHED[name][rank], rel=0.01)


def test_adapters_cost_as_much_as_full_fine_tuning_at_the_published_rank(full: dict[str, int]) -> None:
    for name, rank in (("8B", 887), ("1B", 460)):
        assert Flops(flops(name, rank), full[name]).ratio == pytest.approx(1, rel=0.02)


def test_recomputing_activations_costs_adapters_more_than_three_quarters() -> None:
    """Six passes against eight would be 3/4, but only without adapters the last layer of a block is not recomputed."""
    width, inner, *_ = SHAPES["1B"]
    block = 2 * width * width + 2 * width * width // 4 + 3 * width * inner
    expected = 6 / (8 - 2 * width * inner / block)
    assert flops("1B", 1, True) / flops("1B", None, True) == pytest.approx(expected, rel=0.01)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_in_four_bits_take_the_operations_of_those_that_they_stand_for(llama_folder: Path) -> None:
    batch = next(iter(DataLoader(toys.token_rows(), batch_size=4)))  # pyright: ignore[reportArgumentType]
    plain, packed = (
        trace_step(CausalLM(str(llama_folder), lora=LoRAConfig(rank=2), quantization=kind), batch)
        for kind in (None, "nf4")
    )
    # In layers as narrow as these, the order of products that the shapes suggest differs a little.
    assert packed.flops == pytest.approx(plain.flops, rel=0.02)
    assert packed.attention_flops == plain.attention_flops > 0


def test_attention_grows_with_the_square_of_a_row(llama_folder: Path) -> None:
    """From the operations of one batch follow those of a batch of another shape."""
    short = next(iter(DataLoader(toys.token_rows(), batch_size=4)))  # pyright: ignore[reportArgumentType]
    long = {name: each.repeat(1, 3) for name, each in short.items()}
    traced = [trace_step(CausalLM(str(llama_folder), lora=LoRAConfig(rank=2)), each) for each in (short, long)]
    work = Work.of(traced[0].flops, traced[0].attention_flops, Shape(4, 10))
    assert work(Shape(4, 30)) == pytest.approx(traced[1].flops, rel=0.03)


def test_parameters_are_counted_without_memory(llama_folder: Path) -> None:
    module = CausalLM(str(llama_folder), lora=LoRAConfig(rank=2))
    with built_without_memory(module) as built:
        counted = Parameters.of(built)
    module.configure_model()
    assert counted == Parameters.of(module)
    assert 0 < counted.trained < counted.total


@pytest.mark.parametrize("kind", ["lora", "bfloat16", "dora", "in full", "classifier", "full"])
def test_files_have_the_size_that_was_told(kind: str, tmp_path: Path, llama_folder: Path) -> None:
    """Within some kilobytes, which names of tensors and random states differ by; the optimizer's state exactly."""
    options = {"dora": {"dora": True}, "in full": {"trainable": ["lm_head"]}}.get(kind, {})
    lora = None if kind == "full" else LoRAConfig(rank=4, **options)
    make = SequenceClassifier if kind == "classifier" else CausalLM
    arguments: dict[str, Any] = {"num_labels": 3} if kind == "classifier" else {}
    module = make(str(llama_folder), lora=lora, dtype="bfloat16" if kind == "bfloat16" else None, **arguments)
    batch = next(iter(DataLoader(toys.token_rows(), batch_size=4)))  # pyright: ignore[reportArgumentType]
    if kind == "classifier":
        batch["labels"] = torch.zeros(4, dtype=torch.long)
    memory = trace_step(module, batch).memory
    with built_without_memory(module) as built:
        told = Disk.of(memory, built)
    runner = toys.trainer(tmp_path)
    runner.fit(module, DataLoader([batch] * 2, batch_size=None))  # pyright: ignore[reportArgumentType]
    runner.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    state = [each for each in tree_flatten(checkpoint["optimizer_states"])[0] if isinstance(each, Tensor)]
    assert sum(each.nbytes for each in state) == told.optimizer
    assert (tmp_path / "run.ckpt").stat().st_size == pytest.approx(told.checkpoint, abs=10_000)
    if kind == "full":
        assert told.adapter == 0
        assert told.checkpoint == told.whole_checkpoint
        return
    file = module.save_adapter(tmp_path / "adapter") / "adapter_model.safetensors"
    assert file.stat().st_size == pytest.approx(told.adapter, abs=2_000)
    assert told.adapter < told.checkpoint < told.whole_checkpoint


MEMORY = MemoryParts(weights=2 * 10**9, adapters=10**7, gradients=10**7, optimizer=2 * 10**7)


def run(flops: float = 4e13, steps: int = 10, accumulation: int = 2, validation: int = 0) -> RunWork:
    shape = Shape(4, 100)
    work = Work.of(flops, 0.0, shape)
    return RunWork(steps, steps * accumulation, [shape], work, Validation(validation, [shape] * bool(validation)), 1)


def step(memory: MemoryParts = MEMORY, linears: int = 1, method: str = "lora") -> StepWork:
    return StepWork(memory, linears, method)


def test_the_slowest_of_three_bounds_decides() -> None:
    device = find_devices(name="h100", efficiency=0.5).device
    found = seconds_from_table(step(), run(), device, "bf16-true")
    assert found is not None
    assert found.source == TABLE
    assert "arithmetic decides, at 50% of 989.4 TFLOP/s (bfloat16)" in found.how
    assert found.per_step == pytest.approx(2 * 4e13 / (989.4e12 * 0.5), rel=0.01)
    assert found.total == pytest.approx(10 * found.per_step)
    assert found.low < found.total < found.high
    slow = seconds_from_table(step(linears=500), run(), device, "bf16-true")
    assert slow is not None
    assert "launches of the host decides" in slow.how
    read = seconds_from_table(step(MemoryParts(weights=10**12)), run(steps=1), device, "bf16-true")
    assert read is not None
    assert read.per_step == pytest.approx(2 * 2e12 / 3350e9)


def test_validation_takes_the_forward_part_of_its_batches() -> None:
    device = find_devices(name="h100").device
    for method, share in (("lora", 1 / 2), ("full", 1 / 3)):
        with_it, without = (
            seconds_from_table(step(method=method), run(validation=count), device, "bf16-true") for count in (6, 0)
        )
        assert with_it is not None
        assert without is not None
        assert with_it.validation == pytest.approx(6 * share * 4e13 / (989.4e12 * 0.35))
        assert with_it.total == pytest.approx(without.total + with_it.validation)
        assert with_it.per_step == without.per_step


def test_a_device_that_was_never_measured_is_less_sure() -> None:
    known, other = (seconds_from_table(step(), run(), find_devices(name=name).device, "bf16-mixed") for name in NAMES)
    assert known is not None
    assert other is not None
    assert other.high / other.total > known.high / known.total
    assert "fitted to four steps of one H100 and tested on no others" in known.how
    assert "carried over to this device" in other.how


NAMES = "h100", "a100"


def test_speeds_of_the_user_count_and_are_said_to_be_theirs() -> None:
    named = find_devices("24GiB", peak_tflops=100, bandwidth="1TB/s", efficiency=0.5).device
    found = seconds_from_table(step(), run(), named, "16-mixed")
    assert found is not None
    assert found.per_step == pytest.approx(2 * 4e13 / 50e12, rel=0.01)
    assert "speeds of yours" in found.how
    only_peak = seconds_from_table(step(), run(), find_devices("24GiB", peak_tflops=100).device, "32-true")
    assert only_peak is not None


def test_a_speed_that_is_not_known_is_not_made_up() -> None:
    assert seconds_from_table(step(), run(), Device("cpu", "cpu", 2**34), "32-true") is None
    assert seconds_from_table(step(), run(), find_devices(name="t4").device, "bf16-true") is None


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", "bfloat16"), ("16-true", "float16"), (32, "float32"), (None, "float32"), ("64-true", "float64")],
)
def test_a_precision_decides_the_type_of_products(precision: object, dtype: str) -> None:
    assert compute_dtype(precision) == dtype


def test_measured_steps_of_an_h100_lie_in_the_interval() -> None:
    """Steps of docs/evidence/gpu.md, 8,192 tokens in bfloat16, operations counted by hand from the shapes."""
    device = find_devices(name="h100").device
    measured = {
        "Llama-1B, rank 16": (48.7e12, 112, "lora", 0.1685),
        "Llama-1B, full": (68.4e12, 112, "full", 0.1864),
        "8 layers of Llama-8B, rank 16": (82.6e12, 56, "lora", 0.1986),
        "8 layers of Llama-8B, full": (119.3e12, 56, "full", 0.2921),
    }
    for name, (operations, linears, method, seconds) in measured.items():
        one = run(operations, steps=1, accumulation=1)
        found = seconds_from_table(step(MemoryParts(), linears, method), one, device, "bf16-true")
        assert found is not None
        assert found.low < seconds < found.high, (name, found.per_step / seconds)


def test_shared_parameters_count_once() -> None:
    first = nn.Linear(3, 3, bias=False)
    second = nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    assert Parameters.of(nn.Sequential(first, second)) == Parameters(9, 9)
