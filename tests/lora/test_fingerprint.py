"""Digests tell different bases apart, and are equal for one base in different precisions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject_lora, merge_lora, remove_lora
from lightning_lora.lora.fingerprint import SAMPLE, base_digests, fingerprint, tensor_digest
from tests.support.tiny_models import Net, gpt2, llama, mlp, wake


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_one_base_in_several_precisions_has_one_fingerprint(dtype: torch.dtype) -> None:
    model = llama()
    before = fingerprint(base_digests(model))
    assert fingerprint(base_digests(model.to(dtype))) == before  # pyright: ignore[reportArgumentType]


def test_exact_digests_tell_precisions_and_single_bits_apart() -> None:
    tensor = torch.randn(8, 8)
    nudged = tensor.clone()
    nudged[3, 3] = torch.nextafter(nudged[3, 3], torch.tensor(9.0))
    assert tensor_digest(tensor) == tensor_digest(nudged)
    assert tensor_digest(tensor, exact=True) != tensor_digest(nudged, exact=True)
    assert tensor_digest(tensor, exact=True) != tensor_digest(tensor.bfloat16().float(), exact=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.first.weight.data.mul_(1.1),
        lambda model: model.first.bias.data.add_(0.1),
        lambda model: model.norm.weight.data[0].add_(0.1),
        lambda model: model.second.weight.data.copy_(model.second.weight.data.flip(0)),
        lambda model: setattr(model, "third", nn.Linear(2, 2)),
        lambda model: delattr(model, "norm"),
    ],
)
def test_any_other_base_has_another_fingerprint(change: object) -> None:
    model = mlp()
    before = fingerprint(base_digests(model))
    change(model)  # pyright: ignore[reportCallIssue]
    assert fingerprint(base_digests(model)) != before


def test_names_and_shapes_count() -> None:
    tensor = torch.arange(12.0)
    assert tensor_digest(tensor.reshape(3, 4)) != tensor_digest(tensor.reshape(4, 3))
    assert fingerprint({"a": "1", "b": "2"}) != fingerprint({"a": "2", "b": "1"})
    assert fingerprint({"a": "1", "b": "2"}) == fingerprint({"b": "2", "a": "1"})


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_do_not_change_the_fingerprint(merged: bool) -> None:
    model = gpt2()
    before = base_digests(model)
    inject_lora(model, LoRAConfig(rank=2))
    wake(model)
    if merged:
        merge_lora(model)
    assert base_digests(model) == before
    remove_lora(model)
    assert (base_digests(model) == before) is not merged


def test_compiling_does_not_change_the_fingerprint() -> None:
    model = mlp()
    assert base_digests(torch.compile(model, backend="eager")) == base_digests(model)  # pyright: ignore


def test_what_was_trained_in_full_is_left_out() -> None:
    assert base_digests(Net(), trained={"second.weight"}).keys() == {
        "first.weight",
        "first.bias",
        "norm.weight",
        "norm.bias",
    }


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.float16, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5, 7)])
def test_every_type_and_shape_has_a_digest(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert len(tensor_digest(torch.ones(shape).to(dtype))) == 16


def test_layout_does_not_count() -> None:
    tensor = torch.randn(6, 4)
    assert tensor_digest(tensor.T) == tensor_digest(tensor.T.contiguous())


def test_large_tensors_are_sampled_evenly() -> None:
    tensor = torch.zeros(3 * SAMPLE + 5)
    before = tensor_digest(tensor)
    tensor[4 * 1000] = 1  # every fourth entry is read
    assert tensor_digest(tensor) != before
    tensor[4 * 1000] = 0
    tensor[4 * 1000 + 1] = 1
    assert tensor_digest(tensor) == before
