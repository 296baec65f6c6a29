"""Compiled models share one product among layers with one input, in one graph, and learn what eager ones learn."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, disable_lora, inject_lora, merge_lora, unmerge_lora
from lightning_lora.lora.layers.adapted import lora_layers
from tests.lora.compiled.graphs import Graphs
from tests.support.tiny_models import wake

# Torch's compiler looks at the gradient of whatever a graph is given.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
NUM_LAYERS = 7


class Attention(nn.Module):
    """Three layers with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=i == 1) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        return self.o((q @ k.mT).softmax(-1) @ self.v(x))


class Feed(nn.Module):
    """Two layers with one input, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Blocks(nn.Module):
    """Attention and a gated network; what goes into attention is made outside of it, as in BERT."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.parts = nn.ModuleList([Attention(), Feed()])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + (checkpoint(part, x, use_reentrant=False) if self.checkpointed else part(x))
        return x


def blocks(dtype: torch.dtype = torch.float32, checkpointed: bool = False, **settings: Any) -> Any:
    torch.manual_seed(0)
    module = Blocks(checkpointed)
    inject_lora(module, LoRAConfig(rank=2, alpha=6, **settings))
    wake(module)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora_" in name else dtype)
    return module


def rows(seed: int = 0, num: int = 3) -> Tensor:
    return torch.randn(num, 5, 16, generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def step(run: Any, x: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        y = run(x)
    y.float().square().mean().backward()
    return y


def assert_learns_the_same(compiled: nn.Module, eager: nn.Module, rtol: float = 2e-6) -> None:
    pairs = list(zip(gradients(compiled), gradients(eager), strict=True))
    assert len(pairs) == 2 * NUM_LAYERS
    for found, expected in pairs:
        assert (found - expected).norm() <= rtol * expected.norm()


@pytest.mark.parametrize("dora", [False, True])
def test_layers_with_one_input_share_products_over_steps_and_micro_batches(dora: bool) -> None:
    graphs, module, eager = Graphs(), blocks(dora=dora), blocks(dora=dora)
    compiled = graphs.compile(module)
    for seed in range(3):
        torch.testing.assert_close(step(compiled, rows(seed)), step(eager, rows(seed)), rtol=1e-5, atol=1e-6)
    for found, expected in zip(gradients(module), gradients(eager), strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert graphs.num == 1
    # Each layer: the base's and B's, and for DoRA's norm B A. Each of the 4 inputs: all A's together.
    forward, backward = graphs.products
    assert forward == 2 * NUM_LAYERS + 4 + dora * NUM_LAYERS
    # Each layer: two from the gradient of its output; each input: A's gradient; all layers but the first three: the
    # gradient of their input, from the base's output, and once for each input from all A's.
    assert backward == 2 * NUM_LAYERS + 4 + (NUM_LAYERS - 3) + 3


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_in_bfloat16_it_is_as_exact_as_eager(autocast: torch.dtype | None) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    graphs, module, eager, exact = Graphs(), blocks(dtype), blocks(dtype), blocks(dtype)
    x = rows().to(dtype)
    step(graphs.compile(module), x, autocast)
    step(eager, x, autocast)
    step(exact.double(), x.double())
    errors = [
        max(float((g.double() - e).norm() / e.norm()) for g, e in zip(gradients(each), gradients(exact), strict=True))
        for each in (module, eager)
    ]
    assert errors[0] < 1.5 * errors[1] < 0.1
    assert graphs.products[0] == 2 * NUM_LAYERS + 4


def test_another_shape_is_compiled_once_more_and_no_other() -> None:
    graphs, module, eager = Graphs(), blocks(), blocks()
    compiled = graphs.compile(module)
    for num in (3, 3, 4, 4, 6, 7):
        step(compiled, rows(num=num))
        step(eager, rows(num=num))
    assert_learns_the_same(module, eager)
    assert graphs.num == 2


def test_a_compiled_module_sees_what_happens_to_its_adapters() -> None:
    torch.compiler.reset()
    module, x = blocks(), rows()
    compiled = torch.compile(module, fullgraph=True, backend="eager")

    def check() -> Tensor:
        torch.testing.assert_close(compiled(x), y := module(x), rtol=1e-5, atol=1e-6)
        return y

    awake = check()
    with disable_lora(module):
        assert not torch.allclose(check(), awake, atol=1e-3)
    merge_lora(module)
    with torch.no_grad():
        check()
    unmerge_lora(module)
    wake(module, seed=3)
    assert not torch.allclose(check(), awake, atol=1e-3)
    lora_layers(module)["parts.0.k"].lora_enabled = False
    without_k = check()
    for layer in lora_layers(module).values():
        layer.lora_specs["weight"] = dataclasses.replace(layer.lora_spec, alpha=1.0)
    assert not torch.allclose(check(), without_k, atol=1e-3)


def test_blocks_compiled_one_by_one_share_one_graph_each() -> None:
    graphs, module, eager = Graphs(), blocks(), blocks()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for part in module.parts:
        part.compile(fullgraph=True, backend=graphs.backend)
    for seed in range(2):
        step(module, rows(seed))
        step(eager, rows(seed))
    assert_learns_the_same(module, eager)
    assert graphs.products[:2] == [2 * 4 + 2, 2 * 3 + 2]


def test_a_layer_compiled_alone_computes_alone() -> None:
    graphs, module, eager = Graphs(), blocks(), blocks()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for layer in lora_layers(module).values():
        layer.compile(fullgraph=True, backend=graphs.backend)
    for seed in range(2):
        step(module, rows(seed))
        step(eager, rows(seed))
    assert_learns_the_same(module, eager)
    assert all(num <= 5 for num in graphs.products)
    assert graphs.num == 5  # by bias, shape and gradient of the input


def test_under_activation_checkpointing_each_layer_computes_alone_in_one_graph() -> None:
    graphs, module, eager = Graphs(), blocks(checkpointed=True), blocks(checkpointed=True)
    compiled = graphs.compile(module)
    for seed in range(2):
        step(compiled, rows(seed))
        step(eager, rows(seed))
    assert_learns_the_same(module, eager)
    assert graphs.num == 1
    assert graphs.products[0] == 3 * NUM_LAYERS


class Two(nn.Module):
    """Two layers that return what their update sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def test_dropout_drops_the_same_for_layers_with_one_input_forward_and_backward() -> None:
    module = Two()
    inject_lora(module, LoRAConfig(rank=64, alpha=64, targets="all", dropout=0.25))
    with torch.no_grad():
        for layer in lora_layers(module).values():
            layer.weight.zero_()
            layer.lora_A.copy_(torch.eye(64))
            layer.lora_B.copy_(torch.eye(64))
    graphs, x = Graphs(), torch.ones(50, 64, requires_grad=True)
    compiled, masks = graphs.compile(module.train()), []
    for _ in range(2):
        a, b = compiled(x)
        assert torch.equal(a, b)
        (gradient,) = torch.autograd.grad(a.sum() + b.sum(), x)
        assert torch.equal(gradient, 2 * a)
        assert set(a.unique().tolist()) == {0, float(torch.tensor(1 / 0.75))}
        assert (a == 0).float().mean() == pytest.approx(0.25, abs=0.04)
        masks.append(a)
    assert not torch.equal(*masks)
    module.eval()
    assert torch.equal(compiled(x)[0], x)


def test_a_whole_llama_is_one_graph_with_the_groups_of_its_source() -> None:
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, use_cache=False
    )
    graphs, (module, eager) = Graphs(), _pair(lambda: LlamaForCausalLM(config))
    compiled, ids = graphs.compile(module), torch.arange(12).view(2, 6)
    for run in (compiled, eager) * 2:
        run(input_ids=ids, labels=ids).loss.backward()
    assert_learns_the_same(module, eager)
    assert graphs.num == 1
    assert graphs.products[0] == 2 * NUM_LAYERS + 4 + 1


def test_a_whole_gpt2_is_one_graph() -> None:
    config = GPT2Config(
        vocab_size=48, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    graphs, (module, eager) = Graphs(), _pair(lambda: GPT2LMHeadModel(config))
    compiled, ids = graphs.compile(module), torch.arange(12).view(2, 6)
    for run in (compiled, eager):
        run(input_ids=ids).logits.square().sum().backward()
    for found, expected in zip(gradients(module), gradients(eager), strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert graphs.num == 1


def _pair(make: Any) -> list[Any]:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(make())
        inject_lora(made[-1], LoRAConfig(rank=2))
        wake(made[-1])
    return made


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_torchs_own_compiler_learns_the_same() -> None:
    torch.compiler.reset()
    module, eager = blocks(), blocks()
    compiled = torch.compile(module, fullgraph=True)
    for seed in range(2):
        step(compiled, rows(seed))
        step(eager, rows(seed))
    assert_learns_the_same(module, eager)
