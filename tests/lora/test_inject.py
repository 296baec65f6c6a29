"""Laws of injection: the function, the names and the base stay as they were, and only the factors learn."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    ConfigError,
    LoRAConfig,
    count_parameters,
    disable_lora,
    inject_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lightning_lora.lora.layers import LoRAEmbedding, LoRALinear
from tests.lora.models import ALL, BUILDS, ROWS, WITH_TABLES, Doubled, Mixed, adapted, every_build, output
from tests.support.tiny_models import Net, llama, logits, loss, mlp, portrait, state_bytes


@every_build
def test_a_fresh_adapter_does_not_change_the_function(name: str) -> None:
    build, inputs, config = BUILDS[name]
    module = build().eval()
    before = output(module, inputs)
    inject_lora(module, config)
    assert torch.equal(output(module, inputs), before)
    assert not any(layer.lora_moved for layer in lora_layers(module).values())


@every_build
def test_the_base_is_the_same_objects_under_the_same_names(name: str) -> None:
    build, _, config = BUILDS[name]
    module = build()
    before = portrait(module)
    inject_lora(module, config)
    after = portrait(module)
    assert after["modules"] == before["modules"]
    assert {key: after["parameters"][key] for key in before["parameters"]} == before["parameters"]
    assert {key: after["state"][key] for key in before["state"]} == before["state"]
    assert [key for key in module.state_dict() if "lora_" not in key] == list(before["state"])
    assert {key.rpartition(".")[2] for key in after["state"].keys() - before["state"].keys()} == {"lora_A", "lora_B"}
    for child, kind in before["classes"].items():
        assert issubclass(after["classes"][child], kind)


def test_an_adapted_layer_is_still_what_it_was() -> None:
    module = Mixed()
    inject_lora(module, LoRAConfig(rank=2, adapt_embeddings=True))
    assert isinstance(module.plain, nn.Linear)
    assert type(module.plain) is LoRALinear
    assert isinstance(module.own, Doubled)
    assert isinstance(module.own, LoRALinear)
    assert isinstance(module.transposed, Conv1D)
    assert type(module.table) is LoRAEmbedding
    assert "rank=2, alpha=32" in repr(module.plain)
    assert "LoRADoubled" in repr(module)


def test_hooks_and_user_forwards_keep_firing() -> None:
    module, seen = Mixed(), []
    module.plain.register_forward_hook(lambda *_: seen.append("after"))
    module.own.register_forward_pre_hook(lambda *_: seen.append("before"))
    inject_lora(module, LoRAConfig(rank=2))
    module(ROWS)
    assert (sorted(seen), module.own.calls) == (["after", "before"], 1)
    merge_lora(module)
    unmerge_lora(module)
    remove_lora(module)
    module(ROWS)
    assert (len(seen), module.own.calls) == (4, 2)


def test_a_base_checkpoint_still_loads() -> None:
    module, base = mlp(), mlp(seed=1).state_dict()
    inject_lora(module, ALL)
    missing, unexpected = module.load_state_dict(base, strict=False)
    assert not unexpected
    assert all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in missing)
    assert torch.equal(module.first.weight, base["first.weight"])


def test_adapting_twice_is_refused() -> None:
    module = mlp()
    inject_lora(module, ALL)
    before = portrait(module)
    with pytest.raises(ConfigError, match=r"adapted already, at rank \d+; call remove_lora"):
        inject_lora(module, LoRAConfig(rank=2, targets=["first"]))
    assert portrait(module) == before
    outer = nn.ModuleDict({"inner": module, "more": nn.Linear(4, 4)})
    with pytest.raises(ConfigError, match="adapted already"):
        inject_lora(outer, ALL)


def test_every_operation_needs_an_adapter() -> None:
    module = mlp()
    for operation in (merge_lora, unmerge_lora, remove_lora, lora_state_dict, lambda m: load_lora_state_dict(m, {})):
        with pytest.raises(ConfigError, match=r"Net has no adapters: call inject_lora"):
            operation(module)
    with pytest.raises(ConfigError, match="no adapters"), disable_lora(module):
        pass
    assert lora_layers(module) == {}
    assert count_parameters(module).adapter == 0


def test_factors_start_as_documented() -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"wide": nn.Linear(400, 64), "table": nn.Embedding(50, 40)})
    inject_lora(module, LoRAConfig(rank=16, adapt_embeddings=True))
    wide, table = lora_layers(module).values()
    bound = 1 / 400**0.5
    assert wide.lora_A.abs().max() <= bound
    assert wide.lora_A.var().item() == pytest.approx(1 / (3 * 400), rel=0.1)
    assert not wide.lora_B.any()
    assert not table.lora_A.any()
    assert table.lora_B.var().item() == pytest.approx(1, rel=0.2)
    other = nn.Linear(400, 64)
    inject_lora(other, LoRAConfig(rank=64))
    assert lora_layers(other)[""].lora_A.var().item() == pytest.approx(1 / (3 * 400), rel=0.05)
    gaussian = nn.Linear(400, 64)
    inject_lora(gaussian, LoRAConfig(rank=16, init="gaussian"))
    assert lora_layers(gaussian)[""].lora_A.std().item() == pytest.approx(1 / 16, rel=0.05)


def test_counts_are_those_of_the_shapes() -> None:
    module = mlp()
    report = inject_lora(module, ALL)
    count = count_parameters(module)
    base = 16 * 32 + 32 + 2 * 32 + 32 * 8
    assert count.adapter == count.trainable == 4 * (16 + 32) + 4 * (32 + 8)
    assert count.total == base + count.adapter
    assert count.by_role == {"other": count.adapter}
    assert report.parameters == count
    assert report.adapter_bytes == 4 * count.adapter
    assert count.share == count.adapter / count.total


@every_build
def test_only_the_factors_learn(name: str) -> None:
    module, inputs = adapted(name)
    found = module(inputs)
    getattr(found, "logits", found).float().square().mean().backward()
    for key, parameter in module.named_parameters():
        is_factor = key.rpartition(".")[2] in ("lora_A", "lora_B")
        assert parameter.requires_grad is is_factor
        assert (parameter.grad is not None and bool(parameter.grad.any())) is is_factor, key


def test_training_leaves_the_base_bit_identical() -> None:
    model = llama().train()
    before = state_bytes(model)
    inject_lora(model, WITH_TABLES)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    after = state_bytes(model)
    assert {key: after[key] for key in before} == before
    remove_lora(model)
    assert state_bytes(model) == before


def test_a_70b_model_is_adapted_without_memory_and_at_once() -> None:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    start = time.process_time()
    report = inject_lora(model, LoRAConfig(rank=16))
    seconds = time.process_time() - start
    print(f"560 layers adapted in {seconds:.2f} s of CPU")
    assert len(report.layers) == len(lora_layers(model)) == 560
    assert all(tensor.is_meta for tensor in (*model.parameters(), *lora_state_dict(model).values()))
    # Per layer and unit of rank: q and o 2 x 16384, k and v 2 x 9216, gate, up and down 3 x 36864.
    assert report.parameters.adapter == 80 * 16 * (2 * 16_384 + 2 * 9_216 + 3 * 36_864)
    assert seconds < 10
    remove_lora(model)
    assert not lora_layers(model)


def test_embeddings_and_transposed_layers_are_adapted_on_meta() -> None:
    with torch.device("meta"):
        model = Mixed()
    report = inject_lora(model, LoRAConfig(rank=2, adapt_embeddings=True))
    assert {name: spec.role for name, spec in report.layers.items()} == {
        "table": "embedding",
        "own": "other",
        "transposed": "other",
        "plain": "other",
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in lora_state_dict(model).items()}
    assert shapes["table.lora_A"] == (2, 11)
    assert shapes["table.lora_B"] == (8, 2)
    assert shapes["transposed.lora_A"] == (2, 6)
    assert shapes["transposed.lora_B"] == (5, 2)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    for layer in lora_layers(model).values():
        layer.reset_parameters()
        assert not layer.lora_moved


def test_nets_are_independent() -> None:
    first, second = Net(), Net()
    inject_lora(first, ALL)
    assert type(second.first) is nn.Linear
    assert not logits(llama()).isnan().any()


def test_a_weight_of_another_shape_than_the_layer_was_made_with_is_adapted_as_it_is() -> None:
    layer: Any = nn.Linear(2, 3, bias=False)
    layer.weight = nn.Parameter(torch.randn(2, 5))
    module = nn.Sequential(layer)
    inject_lora(module, LoRAConfig(rank=2))
    assert (tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)) == ((2, 5), (2, 2))
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 5)
    expected = module(x)
    merge_lora(module)
    torch.testing.assert_close(module(x), expected)
