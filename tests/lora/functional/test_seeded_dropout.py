"""Dropout by a seed: the share it keeps, who shares a mask, and who never does."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightning_lora import ConfigError, LoRAConfig, inject_lora
from lightning_lora.lora.functional import AdaptedWeight, fused_lora_linears, seeded_dropout
from lightning_lora.lora.functional.seeded_dropout import drop, kept_share, shared_seed
from tests.support.tiny_models import wake

IN, OUT, R, SCALE = 12, 10, 3, 1.7


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_dropout_keeps_the_share_it_says_and_the_expectation() -> None:
    x = torch.ones(400, 500)
    for dropout in (0.001, 0.1, 0.5):
        dropped = drop(x, dropout, shared_seed(x.clone(), [x])) / kept_share(dropout)
        assert float((dropped > 0).float().mean()) == pytest.approx(kept_share(dropout), abs=0.005)
        assert float(dropped.mean()) == pytest.approx(1, abs=0.01)
        assert abs(kept_share(dropout) - (1 - dropout)) <= 1 / 256


def test_the_update_is_that_of_the_dropped_input() -> None:
    x, A, B = numbers(6, IN).requires_grad_(), numbers(R, IN).requires_grad_(), numbers(OUT, R).requires_grad_()
    W = numbers(OUT, IN)
    torch.manual_seed(3)
    (ours,) = fused_lora_linears(x, [AdaptedWeight(W, None, A, B, SCALE)], 0.3)
    torch.manual_seed(3)
    dropped = drop(x, 0.3, int(torch.randint(2**62, ()))) / kept_share(0.3)
    wanted = F.linear(x, W) + SCALE * dropped @ A.T @ B.T
    torch.testing.assert_close(ours, wanted)
    gradient = numbers(6, OUT)
    for found, expected in zip(
        torch.autograd.grad(ours, (x, A, B), gradient), torch.autograd.grad(wanted, (x, A, B), gradient), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_layers_with_the_same_input_share_a_seed_and_others_do_not() -> None:
    x, y = numbers(4, IN), numbers(4, IN)
    first = shared_seed(x, ["query"])
    assert shared_seed(x, ["key"]) == first
    second = shared_seed(x, ["query"])
    assert second != first, "a second run on the same batch"
    assert shared_seed(x, ["key"]) == second
    assert shared_seed(y, ["value"]) != second
    again = shared_seed(x, ["value"])
    assert again not in (first, second), "another tensor came between"
    x.add_(1)
    assert shared_seed(x, ["gate"]) != again, "the tensor was changed in place"


def test_layers_computed_together_have_all_used_the_seed() -> None:
    x = numbers(4, IN)
    first = shared_seed(x, ["query", "key"])
    assert shared_seed(x, ["value"]) == first
    assert shared_seed(x, ["key"]) != first


def test_a_caller_without_a_name_gets_a_seed_of_its_own() -> None:
    x = numbers(4, IN)
    assert shared_seed(x, [None]) != shared_seed(x, [None])


def test_while_a_graph_is_captured_the_mask_is_drawn_by_the_devices_generator_and_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(seeded_dropout, "is_captured", lambda tensor: True)
    monkeypatch.setattr(torch, "Generator", None)
    x, eye = torch.ones(40, 25, dtype=torch.float64, requires_grad=True), torch.eye(25, dtype=torch.float64)
    layers = [AdaptedWeight(torch.zeros_like(eye), None, eye, eye, 1.0, name) for name in ("query", "key")]
    seen = []
    for _ in range(2):
        (query,), (key,) = (fused_lora_linears(x, [layer], 0.25) for layer in layers)
        assert torch.equal(query, key), "layers with one input"
        drop(torch.ones(30), 0.5, shared_seed(torch.ones(30), ["another"]))
        (gradient,) = torch.autograd.grad(query.sum(), x)
        torch.testing.assert_close(gradient, query.detach())
        assert float((query > 0).double().mean()) == pytest.approx(0.75, abs=0.05)
        seen.append(query)
    assert not torch.equal(*seen)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_graph_with_activation_checkpointing_is_refused(monkeypatch: pytest.MonkeyPatch, use_reentrant: bool) -> None:
    monkeypatch.setattr(seeded_dropout, "is_captured", lambda tensor: True)
    layer = nn.Sequential(nn.Linear(IN, OUT))
    inject_lora(layer, LoRAConfig(rank=R, dropout=0.1, targets=["0"]))
    y = checkpoint(layer, torch.randn(4, IN, requires_grad=True), use_reentrant=use_reentrant)
    with pytest.raises(ConfigError, match=r"under activation checkpointing cannot be captured .* Set dropout to 0"):
        y.sum().backward()


def test_a_seed_from_outside_of_a_graph_is_not_used_within_nor_the_other_way_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = numbers(4, IN)
    assert isinstance(shared_seed(x, ["query"]), int)
    monkeypatch.setattr(seeded_dropout, "is_captured", lambda tensor: True)
    within = shared_seed(x, ["key"])
    assert isinstance(within, Tensor)
    assert shared_seed(x, ["value"]) is within
    monkeypatch.undo()
    assert isinstance(shared_seed(x, ["gate"]), int)


def test_seeds_follow_torchs_own() -> None:
    def draw() -> Tensor:
        torch.manual_seed(5)
        x = torch.ones(4, IN)
        return drop(x, 0.5, shared_seed(x, [x]))

    assert torch.equal(draw(), draw())
    torch.manual_seed(6)
    x = torch.ones(4, IN)
    assert not torch.equal(drop(x, 0.5, shared_seed(x, [x])), draw())


def test_no_input_is_kept_alive() -> None:
    x = numbers(4, IN)
    shared_seed(x, [None])
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None


# In modules


def tied() -> nn.Module:
    model = nn.ModuleDict({"table": nn.Embedding(OUT, IN), "head": nn.Linear(IN, OUT, bias=False)})
    model["head"].weight = model["table"].weight
    return model


BUILDS: dict[str, Any] = {
    "linear": (lambda: nn.ModuleDict({"head": nn.Linear(IN, OUT)}), {}),
    "transposed": (lambda: nn.ModuleDict({"head": Conv1D(OUT, IN)}), {}),
    # Its factors are views of the table's, made anew for each call.
    "tied head": (tied, {"targets": ["head", "table"], "tied_weights": "both"}),
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BUILDS)
def test_a_layer_that_runs_twice_on_a_tensor_drops_other_entries(kind: str, dtype: torch.dtype) -> None:
    build, settings = BUILDS[kind]
    model = build().to(dtype)
    inject_lora(model, LoRAConfig(rank=2, dropout=0.5, **settings))
    wake(model, size=1.0)
    layer, x = model.train()["head"], torch.randn(20, IN, dtype=dtype)
    for _ in range(3):
        assert not torch.equal(layer(x), layer(x))
    # And while gradients accumulate.
    outputs = [layer(x) for _ in range(3)]
    for y in outputs:
        y.float().square().sum().backward()
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_with_one_input_share_the_mask_alone_and_together(dtype: torch.dtype) -> None:
    layer = nn.Linear(IN, OUT, dtype=dtype)
    model = nn.ModuleList([layer, copy.deepcopy(layer), copy.deepcopy(layer)])
    inject_lora(model, LoRAConfig(rank=2, dropout=0.5))
    wake(model, size=1.0)
    for other in model[1:]:
        other.load_state_dict(model[0].state_dict())
    for _ in range(3):
        # From the second pass on, the three are computed together.
        x = torch.randn(20, IN, dtype=dtype)
        query, key, value = (layer(x) for layer in model.train())
        # Another mask would differ by the size of the update; products of another shape may round in another order.
        atol = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(key, query, rtol=0, atol=atol)
        torch.testing.assert_close(value, query, rtol=0, atol=atol)
        assert not torch.equal(model[1](x), key), "called once more, alone"
        (query + key + value).sum().backward()
