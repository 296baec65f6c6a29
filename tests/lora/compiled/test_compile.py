"""A compiled module computes what the eager one does, whatever happens to its adapters."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from lightning_lora import disable_lora, inject_lora, load_lora_state_dict, lora_state_dict, merge_lora, unmerge_lora
from tests.lora.models import ALL
from tests.support.tiny_models import mlp, wake


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_module_equals_the_eager_one_in_one_graph() -> None:
    torch.compiler.reset()
    module, eager = mlp(), mlp()
    for each in (module, eager):
        inject_lora(each, ALL)
        wake(each)
    x = torch.randn(3, 16)
    y, expected = torch.compile(module, fullgraph=True)(x), eager(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in eager.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(module.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-6)


def test_a_compiled_module_sees_adapters_switched_off_merged_and_loaded() -> None:
    torch.compiler.reset()
    module = mlp()
    inject_lora(module, ALL)
    wake(module)
    compiled, x = torch.compile(module, fullgraph=True, backend="eager"), torch.randn(3, 16)
    awake = module(x)
    torch.testing.assert_close(compiled(x), awake, rtol=1e-5, atol=1e-6)
    with disable_lora(module):
        asleep = module(x)
        torch.testing.assert_close(compiled(x), asleep, rtol=1e-5, atol=1e-6)
    merge_lora(module)
    torch.testing.assert_close(compiled(x), awake, rtol=1e-5, atol=1e-5)
    unmerge_lora(module)
    wake(module, seed=5)
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(awake, asleep)
    assert not torch.allclose(awake, module(x))


def test_a_compiled_module_has_the_names_of_the_eager_one() -> None:
    module = mlp()
    inject_lora(module, ALL)
    wake(module)
    compiled = torch.compile(module, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert list(lora_state_dict(compiled)) == list(lora_state_dict(module))
    load_lora_state_dict(compiled, lora_state_dict(module))
    inner = mlp()
    inject_lora(inner, ALL)
    inner.first = torch.compile(inner.first, backend="eager")  # pyright: ignore
    assert list(lora_state_dict(inner)) == list(lora_state_dict(module))
