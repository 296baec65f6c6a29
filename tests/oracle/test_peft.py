"""PEFT as oracle: equal tensors give equal losses, gradients, files and merged models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_lora import LoRAConfig, inject_lora, load_adapter, lora_layers, lora_state_dict, save_adapter
from lightning_lora.files.adapter.peft_format import PREFIX
from lightning_lora.files.merge.merged_model import save_merged
from lightning_lora.lora.layers import LoRAEmbedding
from tests.oracle.peft_models import (
    ALL_LINEAR,
    PAIRS,
    both,
    every_pair,
    peft_warnings,
    their_factors,
    without_manifest,
    wrapped,
)
from tests.support.tiny_models import llama, logits, loss, portrait, wake

pytestmark = peft_warnings
Build = Callable[[], PreTrainedModel]


def loss_and_gradients_are_those_of_peft(build: Build, ours: Any, theirs: Any, folder: Path) -> None:
    our_loss, their_loss = loss(ours), loss(theirs)
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=0)
    our_loss.backward()
    their_loss.backward()
    factors = their_factors(theirs)
    for name, layer in lora_layers(ours).items():
        for factor in ("lora_A", "lora_B"):
            expected, found = factors[f"{name}.{factor}"].grad, getattr(layer, factor).grad
            assert expected is not None
            assert expected.abs().max() > 0
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def our_folder_loads_in_peft_with_equal_logits(build: Build, ours: Any, _: Any, folder: Path) -> None:
    save_adapter(ours, folder / "ours")
    loaded = peft.PeftModel.from_pretrained(build(), folder / "ours")
    assert (logits(loaded) - logits(ours)).abs().max() <= 1e-6
    assert (logits(loaded) - logits(build())).abs().max() > 1e-3
    assert their_factors(loaded).keys() == lora_state_dict(ours).keys()
    assert not their_factors(loaded).popitem()[1].requires_grad


def pefts_folder_loads_here_with_equal_logits(build: Build, ours: Any, theirs: Any, folder: Path) -> None:
    theirs.save_pretrained(str(folder / "theirs"))
    model = build()
    with without_manifest():
        load_adapter(model, folder / "theirs")
    assert (logits(model) - logits(theirs)).abs().max() <= 1e-6
    assert {name: layer.lora_spec.scale for name, layer in lora_layers(model).items()} == {
        name: layer.lora_spec.scale for name, layer in lora_layers(ours).items()
    }
    save_adapter(model, folder / "again")
    again = build()
    load_adapter(again, folder / "again")
    assert torch.equal(logits(again), logits(model))


LAWS = (
    loss_and_gradients_are_those_of_peft,
    our_folder_loads_in_peft_with_equal_logits,
    pefts_folder_loads_here_with_equal_logits,
)


@every_pair
def test_every_law_holds(pair: str, tmp_path: Path, subtests: pytest.Subtests) -> None:
    # Both models are built once for all laws of a pair.
    ours, theirs = both(pair)
    for law in LAWS:
        with subtests.test(law.__name__):
            law(PAIRS[pair][0], ours, theirs, tmp_path)


def test_a_padding_token_gives_the_gradients_of_peft() -> None:
    ours, theirs = both("embeddings")
    tokens = torch.tensor([[0, 0, 5, 9, 11, 3], [7, 8, 9, 10, 11, 12]])
    for model in (ours, theirs):
        model(tokens, labels=tokens).loss.backward()
    name = "model.embed_tokens.lora_A"
    layer = lora_layers(ours)["model.embed_tokens"]
    torch.testing.assert_close(layer.lora_A.grad, their_factors(theirs)[name].grad, rtol=1e-5, atol=1e-9)


def test_a_fresh_adapter_has_the_distribution_of_peft() -> None:
    ours = llama(hidden_size=128, intermediate_size=256)
    theirs = wrapped(llama(hidden_size=128, intermediate_size=256), target_modules=ALL_LINEAR, r=32)
    inject_lora(ours, LoRAConfig(rank=32))
    for name, tensor in lora_state_dict(ours).items():
        expected = their_factors(theirs)[name]
        # The spread of a sample standard deviation of n uniform values is below sd / sqrt(n).
        band = 4 / tensor.numel() ** 0.5
        assert tensor.std().item() == pytest.approx(expected.std().item(), rel=2 * band)
        assert tensor.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.01)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_loads_in_transformers(tied: bool, tmp_path: Path) -> None:
    ours = llama(tie_word_embeddings=tied)
    inject_lora(ours, LoRAConfig(rank=4, adapt_head=not tied, adapt_embeddings=not tied))
    wake(ours)
    before = portrait(ours)
    save_merged(ours, tmp_path / "merged")
    assert portrait(ours) == before
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(ours)).abs().max() <= 1e-5
    assert not any("lora" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))


def test_a_merged_gpt2_equals_pefts_merge(tmp_path: Path) -> None:
    ours, theirs = both("gpt2")
    save_merged(ours, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = theirs.merge_and_unload().state_dict()  # pyright: ignore[reportCallIssue]
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_an_embedding_is_stored_as_peft_stores_it(tmp_path: Path) -> None:
    ours, _ = both("embeddings")
    save_adapter(ours, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert isinstance(lora_layers(ours)["model.embed_tokens"], LoRAEmbedding)
    assert tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"].shape == (4, 64)
    assert tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"].shape == (32, 4)
