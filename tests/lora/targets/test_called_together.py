"""Layers that the source of a module calls with one input."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from lightning_lora import LoRAConfig, inject_lora, remove_lora
from lightning_lora.lora.targets.called_together import called_together


class Module(nn.Module):
    """Three layers with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))


class Together(Module):
    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.a(x)
        if x.shape[0] and (y := first + self.b(x)).numel():
            return y
        return self.b(x) + self.c(x)


class OneExpression(Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x).view(x.shape) * self.b(x))


class Assigned(Module):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x)


class Added(Module):
    def forward(self, x: Tensor) -> Tensor:
        x += self.a(x)
        return self.b(x)


class Annotated(Module):
    def forward(self, x: Any) -> Any:  # pyright: ignore[reportRedeclaration]
        x: Any = self.a(x)
        return self.b(x)


class Changed(Module):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x.add_(1)
        return y + self.b(x)


class Conditional(Module):
    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        y = self.a(x)
        return y + (self.b(x) if more else 0)


class Apart(Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.a(x)
        if len(y):
            return y + self.b(other)
        return y + self.b(x)


class Other(Together):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(x) * self.a(x)


@pytest.mark.parametrize(
    ("kind", "runs"),
    [
        (Together, (("b", "c"),)),
        (OneExpression, (("a", "b"),)),
        (Other, (("c", "a"),)),
        (Assigned, ()),
        (Added, ()),
        (Annotated, ()),
        (Changed, ()),
        (Conditional, ()),
        (Apart, ()),
        (LlamaAttention, (("q_proj", "k_proj", "v_proj"),)),
        (LlamaMLP, (("gate_proj", "up_proj"),)),
        (BertSelfAttention, (("query", "key", "value"),)),
    ],
)
def test_the_source_says_which_layers_have_one_input(kind: type[nn.Module], runs: Any) -> None:
    calls = called_together(kind)
    assert calls is not None
    assert calls.runs == runs


def test_code_that_was_replaced_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Replaced(Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    class Kept(Replaced):
        pass

    kept = called_together(Kept)
    assert kept is not None
    assert kept.runs == (("a", "b"),)
    monkeypatch.setattr(Replaced, "forward", Assigned.forward)
    assert called_together(Replaced) is None


def test_adapted_layers_know_their_group_also_as_copies_until_the_adapter_is_removed() -> None:
    module = OneExpression()
    inject_lora(module, LoRAConfig(rank=2, targets=["a", "b", "c"]))
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        a, b, c = (dict(each.named_children())[name] for name in "abc")
        assert a.lora_group[0].layers == b.lora_group[0].layers == (a, b)  # pyright: ignore
        assert c.lora_group is None
    remove_lora(module)
    assert not any(hasattr(layer, "lora_group") for layer in module.children())
    assert torch.is_tensor(module(torch.ones(1, 4)))


def test_a_layer_that_is_not_adapted_is_in_no_group() -> None:
    module = OneExpression()
    inject_lora(module, LoRAConfig(rank=2, targets=["a", "c"]))
    assert module.a.lora_group is None
