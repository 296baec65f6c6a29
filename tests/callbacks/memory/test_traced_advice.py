"""The advice at an out-of-memory error names what fits by its trace, and a step that cannot fit is told before."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, lora_layers
from lightning_lora.callbacks import LoRAGuard, MemoryAdvice
from lightning_lora.callbacks.layer_calls import LayerCallRecorder
from lightning_lora.callbacks.memory import memory_advice
from lightning_lora.memory import run_step
from lightning_lora.memory.step_trace import trace_step
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.tasks import CausalLM
from tests.callbacks.memory.small_device import TOKENS, WIDTH, Module, Rows, bytes_of, have
from tests.support import toys

pytestmark = toys.expected_warnings


@pytest.fixture(autouse=True)
def time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_step, "SECONDS", 600.0)


def message(folder: Path, module: Any, data: Any, **options: Any) -> str:
    """The advice of a run that runs out of memory."""
    trainer = toys.trainer(folder, callbacks=[MemoryAdvice(), LoRAGuard()], **options)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.fit(module, datamodule=data)
    return str(caught.value).partition("\n\n")[2]


def test_the_micro_batch_that_fits_is_named_with_accumulation_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, bytes_of(4, 8))
    head, first, *_ = message(tmp_path, Module(4), Rows(16), accumulate_grad_batches=2).splitlines()
    told = r"A traced step with this batch of 16 rows takes 0.\d+ MB, and the device has 0.\d+ MB for it"
    assert re.fullmatch(rf"Out of memory in optimizer step 1. {told}. Lower, in this order:", head)
    needed = run_step.gigabytes(bytes_of(4, 8))
    assert first == (
        f"  1. batch_size: 16 -> 4; with trainer.accumulate_grad_batches 2 -> 8 the optimizer step stays as large: "
        f"{needed}"
    )
    # The advice is right.
    toys.trainer(tmp_path, accumulate_grad_batches=8).fit(Module(4), datamodule=Rows(4))


def test_a_step_that_is_not_traced_is_advised_as_without_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, 1)
    monkeypatch.setattr(run_step, "SECONDS", -1.0)
    head, first, *_ = message(tmp_path, Module(5), Rows(15)).splitlines()
    assert head.startswith("Out of memory in optimizer step 1. no trace of 15 rows was begun")
    assert first == (
        "  1. batch_size: 15 -> 5; with trainer.accumulate_grad_batches 1 -> 3 the optimizer step stays as large"
    )


class Tokens(LightningDataModule):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        tokens = torch.arange(64) % 50
        rows: Any = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}] * 4
        return DataLoader(rows, self.batch_size)


class Cramped(CausalLM):
    """Has no room for a real batch."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not isinstance(loss, FakeTensor):
            raise torch.OutOfMemoryError("no room")
        return loss


def step_bytes(module: CausalLM, rows: int, precision: str = "32-true", accumulation: int = 1) -> int:
    batch = next(iter(Tokens(rows).train_dataloader()))
    return trace_step(module, batch, precision=precision, accumulate_grad_batches=accumulation).memory.total


def test_a_method_that_fits_comes_before_a_batch_that_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one row fits in float32, but it does in bfloat16; the traces before the run are not made again."""
    row = [torch.ones(1, 1, WIDTH)]
    needed, too_much = (
        trace_step(Module(), row, precision=precision, accumulate_grad_batches=2).memory.total
        for precision in ("bf16-true", "32-true")
    )
    assert needed < too_much
    have(monkeypatch, needed)
    made: list[Any] = []
    real = run_step.StepTracer
    monkeypatch.setattr(run_step, "StepTracer", lambda *arguments: made.append(1) or real(*arguments))
    with pytest.warns(UserWarning, match="It will probably run out of memory"):
        lines = message(tmp_path, Module(0), Rows(2, tokens=1)).splitlines()[1:]
    assert lines == [
        "  1. trainer.precision: 32-true -> bf16-true; half of weights and activations (with batch_size 1): "
        f"{run_step.gigabytes(needed)}",
        "  2. batch_size: 2 -> 1; with trainer.accumulate_grad_batches 1 -> 2 the optimizer step stays as large: "
        f"{run_step.gigabytes(too_much)}, not enough by itself",
        "  3. the model: a smaller one, or more devices that share it (cli_configs/strategy/fsdp2.yaml)",
    ]
    assert len(made) == 2


def settings_of(lines: list[str]) -> dict[str, str]:
    """The bytes of each setting in the advice."""
    found = [re.fullmatch(r"  \d\. ([a-z_. ]+): .*: ([\d.,]+ [GM]B)", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


@pytest.mark.slow
def test_full_fine_tuning_is_told_what_adapters_take(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = str(llama_folder)
    monkeypatch.setattr(memory_advice, "_MANY", 1.0)  # the vocabulary of so small a model would be named too
    have(monkeypatch, 10**9)
    found = settings_of(message(tmp_path, Cramped(llama), Tokens(2)).splitlines()[1:])
    now, low = step_bytes(CausalLM(llama), 2), step_bytes(CausalLM(llama), 2, "bf16-true")
    expected = {
        "batch_size": run_step.gigabytes(step_bytes(CausalLM(llama), 1, accumulation=2)),
        "lora": run_step.gigabytes(step_bytes(CausalLM(llama, lora=LoRAConfig()), 2)),
    }
    # A precision that takes no less is not named.
    assert found == (expected | {"trainer.precision": run_step.gigabytes(low)} if low < now else expected)


@pytest.mark.slow
def test_checkpointing_and_4_bits_are_traced_too(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    llama, lora = str(llama_folder), LoRAConfig(rank=2)
    monkeypatch.setattr(memory_advice, "_MANY", 1.0)  # the vocabulary of so small a model would be named too
    have(monkeypatch, 10**9)
    found = settings_of(message(tmp_path, Cramped(llama, lora=lora), Tokens(1), precision="bf16-true").splitlines()[1:])
    again = CausalLM(llama, lora=lora, activation_checkpointing=True)
    assert found["activation_checkpointing"] == run_step.gigabytes(step_bytes(again, 1, "bf16-true"))
    now, nf4 = (step_bytes(CausalLM(llama, lora=lora, quantization=name), 1, "bf16-true") for name in (None, "nf4"))
    # A method that takes no less, as copies of so small weights do, is not named.
    assert found.get("quantization") == (run_step.gigabytes(nf4) if nf4 < now else None)


class Logits(LightningModule):
    """A language model of one's own whose loss takes whole logits."""

    def __init__(self) -> None:
        super().__init__()
        small: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=2000, **small))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        if not isinstance(logits, FakeTensor):
            raise torch.OutOfMemoryError("no room")
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters())


@pytest.mark.slow
def test_logits_that_take_much_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, 10**9)
    told = r"the loss: cross-entropy of whole logits -> lightning_lora.tasks.head_loss, .* gradients take [\d.]+ MB"
    assert re.search(told, message(tmp_path, Logits(), Tokens(2)))


class Own(LoRAMixin, Module):
    """A module of one's own, fine-tuned in full."""

    def __init__(self, fits: int = 16, width: int = WIDTH) -> None:
        super().__init__(fits)
        self.net.append(nn.Sequential(nn.Linear(WIDTH, width), nn.Linear(width, width), nn.Linear(width, WIDTH)))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lora_parameter_groups(1e-3))


@pytest.mark.parametrize(("width", "saves"), [(256, True), (WIDTH, False)])
def test_adapters_are_named_for_a_module_of_ones_own_if_they_take_less(
    width: int, saves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, 10**9)
    module = Own(0, width)
    found = settings_of(message(tmp_path, module, Rows(16, tokens=1)).splitlines()[1:])
    adapted = Own(0, width)
    adapted.lora = LoRAConfig()
    needed = trace_step(adapted, [torch.ones(16, 1, WIDTH)]).memory.total
    assert found.get("lora") == (run_step.gigabytes(needed) if saves else None)
    assert module.lora is None


@pytest.mark.parametrize(("share", "told"), [(0.9, True), (1.0, False)])
def test_a_run_whose_step_cannot_fit_is_warned_once_before_it(
    share: float, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, int(share * bytes_of(16, tokens=1)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toys.trainer(tmp_path, callbacks=[MemoryAdvice()]).fit(Module(), datamodule=Rows(16, tokens=1))
    texts = [str(each.message) for each in caught if "run out of memory" in str(each.message)]
    assert len(texts) == told
    if told:
        assert re.match(
            r"A traced step with this batch of 16 rows takes 0.\d+ MB, and the device has 0.\d+ MB", texts[0]
        )
        assert "It will probably run out of memory. Lower, in this order:\n  1. " in texts[0]


def test_a_model_that_leaves_half_of_the_memory_is_not_traced_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced(*_: Any) -> None:
        raise AssertionError("a trace takes time")

    have(monkeypatch, 10**6)
    monkeypatch.setattr(run_step, "StepTracer", traced)
    toys.trainer(tmp_path, callbacks=[MemoryAdvice()]).fit(Module(), datamodule=Rows(16))


def test_a_trace_while_calls_of_layers_are_recorded_runs_and_records_no_layer_of_the_module() -> None:
    """`LoRAGuard` replaces methods of layers while a batch runs, which may run out of memory."""
    module, batch = Own(), [torch.ones(16, TOKENS, WIDTH)]
    module.lora = LoRAConfig(rank=2)
    module.configure_model()
    expected = trace_step(module, batch)
    recorder = LayerCallRecorder(module)
    recorder.start(module)
    assert trace_step(module, batch) == expected
    assert all(parameter.grad is None for parameter in module.parameters())
    recorder.stop()
    assert set(recorder.not_called) == set(lora_layers(module))
    recorder.start(module)
    module.net(batch[0])
    recorder.stop()
    assert recorder.not_called == []
