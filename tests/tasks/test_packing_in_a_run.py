"""A run on packed rows checks its model first: models that mix examples are refused, others are not disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import find_packed_sequence_indices

from lightning_lora import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.tasks import CausalLM
from tests.support import tiny_models, toys
from tests.support.packed import (
    LAYOUTS,
    MIXES,
    MODELS,
    Recorded,
    assert_same_training,
    examples,
    save,
    trained,
)

pytestmark = [
    *toys.expected_warnings,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


# Recurrence, convolution, both, ALiBi, masks without positions, positions from 2.
@pytest.mark.parametrize("name", ["Mamba", "LFM2", "Qwen3-Next", "BLOOM", "GPT-OSS", "RoBERTa"])
def test_a_model_that_mixes_examples_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    MIXES[name]().save_pretrained(folder)
    for layout in ("even rows", "packs"):
        with pytest.raises(ConfigError, match=r"does not keep packed examples apart: .*Turn packing off") as caught:
            trained(folder, tmp_path, LAYOUTS[layout](examples()), lora=None)
        assert "ForCausalLM" in str(caught.value)
    trained(folder, tmp_path, LAYOUTS["padded"](examples()), lora=None)


def one_row_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """As FlashAttention in transformers: examples are looked for in the positions of a batch of one row."""
    assert mask is None
    positions, length = kwargs["position_ids"], query.shape[2]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    if len(query) == 1:
        found = find_packed_sequence_indices(positions)
        mask = mask if found is None else mask & (found[0][:, None] == found[0])
    return sdpa_attention_forward(module, query, key, value, mask[None, None], **kwargs)


@pytest.fixture
def one_row_kernel() -> Any:
    AttentionInterface.register("one_row", one_row_attention)
    AttentionMaskInterface.register("one_row", lambda **_: None)
    yield
    del AttentionInterface._global_mapping["one_row"], AttentionMaskInterface._global_mapping["one_row"]


def test_packs_are_laid_in_one_row_for_a_kernel_that_wants_one(one_row_kernel: None, tmp_path: Path) -> None:
    folder = save(tiny_models.llama(), tmp_path / "model")
    packs = LAYOUTS["packs"](examples())
    runs: list[Recorded] = []
    predicted: list[list[dict[str, Tensor]]] = []
    for attention in ("sdpa", "one_row"):
        module = Recorded(str(folder), learning_rate=1e-4, lora=LoRAConfig(rank=4))
        module.configure_model()
        assert module.model is not None
        module.model.set_attn_implementation(attention)
        tiny_models.wake(module, size=0.2)
        runner = toys.trainer(tmp_path, accumulate_grad_batches=2)
        predicted.append(runner.predict(module, packs) or [])  # pyright: ignore
        runner.fit(module, packs)
        runs.append(module)
    assert [module._separates_rows for module in runs] == [True, False]
    assert_same_training(runs[1], runs[0])
    torch.testing.assert_close(predicted[1], predicted[0], rtol=1e-5, atol=1e-6)


class Counting(CausalLM):
    """Remembers for each forward pass whether it is in training mode and with gradients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.model is not None
        self.calls.append((self.model.training, torch.is_grad_enabled()))
        return super().forward(*args, **kwargs)


class Frozen(Callback):
    """Keeps a part of the model in eval mode, as a user may."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.part(pl_module).eval()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        assert not self.part(pl_module).training
        assert pl_module.model.training  # pyright: ignore

    def part(self, pl_module: LightningModule) -> nn.Module:
        return pl_module.model.model.layers[0]  # pyright: ignore


def test_a_run_is_checked_once_and_not_disturbed(tmp_path: Path) -> None:
    module = Counting(str(save(tiny_models.llama(), tmp_path / "model")), lora=LoRAConfig(rank=2, dropout=0.2))
    loader = LAYOUTS["even rows"](examples())
    module.configure_model()
    drawn: list[Tensor] = []
    for epochs in (2, 1):
        module.calls.clear()
        torch.manual_seed(3)
        toys.trainer(tmp_path, max_epochs=epochs, callbacks=[Frozen()]).fit(module, loader)
        drawn.append(torch.rand(1))
        # Two passes to see whether examples are kept apart, two to see whether the model is causal.
        assert sum(not training for training, _ in module.calls) == 4
        assert all(training == gradients for training, gradients in module.calls if not training)
    # A padded run is not checked, and draws the same random numbers.
    padded = CausalLM(str(tmp_path / "model"), lora=LoRAConfig(rank=2, dropout=0.2))
    padded.configure_model()
    for epochs, expected in zip((2, 1), drawn, strict=True):
        torch.manual_seed(3)
        toys.trainer(tmp_path, max_epochs=epochs, callbacks=[Frozen()]).fit(padded, LAYOUTS["padded"](examples()))
        assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true"])
@pytest.mark.parametrize("model", ["llama, sdpa", "gpt2", "olmoe"])
def test_low_precision_is_no_leak(model: str, precision: Any, tmp_path: Path) -> None:
    folder = save(MODELS[model][0](), tmp_path / "model")
    for layout in ("even rows", "packs"):
        module = CausalLM(str(folder), lora=LoRAConfig(rank=2))
        toys.trainer(tmp_path, precision=precision, max_steps=1).fit(module, LAYOUTS[layout](examples()))
        assert module._separates_rows


@pytest.mark.parametrize("name", ["Mamba", "GPT-OSS"])
def test_a_leak_shows_in_low_precision(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    MIXES[name]().save_pretrained(folder)
    module = CausalLM(str(folder))
    with pytest.raises(ConfigError, match="does not keep packed examples apart"):
        toys.trainer(tmp_path, precision="bf16-true").fit(module, LAYOUTS["packs"](examples()))
