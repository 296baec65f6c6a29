"""Laws of every kind of adapted layer; a test class lists the cases that it runs them on."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from lightning_lora import (
    LoRAConfig,
    disable_lora,
    inject_lora,
    load_adapter,
    lora_layers,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.lora.layers.adapted import adapted_weights, base_parameter
from tests.support.tiny_models import portrait, state_bytes, wake


def as_matrix(delta: Tensor, weight: Tensor) -> Tensor:
    """``B A`` in the layout of the weight: most weights are the matrix, or the matrix over the unfolded kernel."""
    return delta.reshape(weight.shape)


@dataclass(frozen=True)
class Case:
    """A module with inputs for it, and the layout of its weights.

    Args:
        build: Makes the module.
        inputs: Makes inputs in float64.
        num_weights: Number of weights that are adapted.
        settings: Settings of the adapter beside rank 2.
        lay_out: Turns ``B A`` and a weight into ``B A`` in the layout of the weight.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    num_weights: int
    settings: dict[str, Any] = field(default_factory=dict)
    lay_out: Callable[[Tensor, Tensor], Tensor] = as_matrix

    def plain(self) -> nn.Module:
        torch.manual_seed(0)
        # A layer under a name, as in every model.
        return nn.ModuleDict({"layer": self.build()}).double()

    def adapted(self, awake: bool = True) -> nn.Module:
        module = self.plain()
        inject_lora(module, LoRAConfig.from_dict({"rank": 2, **self.settings}))
        if awake:
            wake(module, size=0.5)
        return module

    def output(self, module: nn.Module) -> Tensor:
        torch.manual_seed(7)
        return first(module["layer"](*self.inputs()))  # pyright: ignore[reportIndexIssue]


def first(output: Any) -> Tensor:
    """The first tensor among the outputs of a layer."""
    while isinstance(output, tuple):
        output = output[0]
    return output


class ShapeLaws:
    """Laws that depend on shapes and options of a layer, so they run on every case."""

    cases: dict[str, Case]

    def test_every_weight_is_adapted_and_its_factors_are_matrices(self, case: Case) -> None:
        module = case.adapted()
        weights = adapted_weights(module)
        assert len(weights) == case.num_weights
        for layer, weight in weights.values():
            num_in, num_out, _ = layer.weights(layer)[weight]
            A, B = layer.lora_pair(weight)
            assert num_in * num_out == getattr(layer, weight).numel()
            assert (tuple(A.shape), tuple(B.shape)) == ((A.shape[0], num_in), (num_out, A.shape[0]))

    def test_an_adapter_is_the_sum_of_weight_and_update_in_value_and_gradient(self, case: Case) -> None:
        for mode in (True, False):
            module, base = case.adapted().train(mode), case.plain().train(mode)
            effective, pairs = {}, {}
            for name, (layer, weight) in adapted_weights(module).items():
                A, B = (factor.detach().clone().requires_grad_() for factor in layer.lora_pair(weight))
                plain = getattr(layer, weight).detach()
                scale = 32.0 / A.shape[0]
                effective[base_parameter(name, layer, weight)] = plain + scale * case.lay_out(B @ A, plain)
                pairs[name] = (A, B)
            torch.manual_seed(7)
            names = {name.removeprefix("layer."): value for name, value in effective.items()}
            expected = first(functional_call(base["layer"], names, case.inputs()))  # pyright: ignore
            found = case.output(module)
            assert (found - case.output(base)).abs().max() > 1e-3
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            direction = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(3))
            (found * direction).sum().backward()
            (expected * direction).sum().backward()
            for name, (layer, weight) in adapted_weights(module).items():
                for factor, reference in zip(layer.lora_pair(weight), pairs[name], strict=True):
                    assert reference.grad is not None
                    assert reference.grad.abs().max() > 0
                    torch.testing.assert_close(factor.grad, reference.grad, rtol=1e-8, atol=1e-8)
            assert all(p.grad is None for p in module.parameters() if not p.requires_grad)

    def test_merging_does_not_change_the_function_and_unmerging_restores_every_bit(self, case: Case) -> None:
        module = case.adapted().float()
        before, expected = state_bytes(module), case_output(case, module)
        merge_lora(module)
        torch.testing.assert_close(case_output(case, module), expected, rtol=1e-5, atol=1e-5)
        unmerge_lora(module)
        assert state_bytes(module) == before
        assert torch.equal(case_output(case, module), expected)


class Laws(ShapeLaws):
    """All laws of a kind of adapted layer; those that shapes cannot break run on the ``kinds`` among the cases.

    A kind is a way to compute: each class of adapted layer, and each path through it, is there once.
    """

    kinds: tuple[str, ...]

    def test_a_fresh_adapter_does_not_change_the_function(self, case: Case) -> None:
        for mode in (True, False):
            torch.testing.assert_close(
                case.output(case.adapted(awake=False).train(mode)),
                case.output(case.plain().train(mode)),
                rtol=0,
                atol=1e-12,
            )

    def test_evaluation_without_gradients_computes_the_same(self, case: Case) -> None:
        module = case.adapted().eval()
        with torch.no_grad():
            torch.testing.assert_close(case.output(module), case.output(module.train()), rtol=1e-9, atol=1e-9)

    def test_disabling_gives_the_base(self, case: Case) -> None:
        module = case.adapted().eval()
        with disable_lora(module):
            torch.testing.assert_close(case.output(module), case.output(case.plain().eval()), rtol=0, atol=1e-12)

    def test_removing_leaves_no_trace(self, case: Case) -> None:
        base = case.plain()
        before = portrait(base) | {"trains": None}
        inject_lora(base, LoRAConfig.from_dict({"rank": 2, **case.settings}))
        case.output(base)
        with torch.no_grad():
            case.output(base.eval())
        remove_lora(base)
        assert portrait(base) | {"trains": None} == before
        torch.testing.assert_close(case.output(base), case.output(case.plain().eval()), rtol=0, atol=1e-12)

    def test_a_saved_adapter_loads_bit_for_bit(self, case: Case, tmp_path: Path) -> None:
        module, other = case.adapted(), case.plain()
        with warnings.catch_warnings():
            # Whether PEFT can load it is another test's question.
            warnings.filterwarnings("ignore", message="PEFT ")
            save_adapter(module, tmp_path / "adapter")
        load_adapter(other, tmp_path / "adapter")
        assert state_bytes(other) == state_bytes(module)
        assert torch.equal(case.output(other), case.output(module))
        assert lora_layers(other).keys() == lora_layers(module).keys()
        load_adapter(module, tmp_path / "adapter")

    def test_copies_and_pickles_compute_the_same_and_learn_alone(self, case: Case) -> None:
        module = case.adapted()
        expected = case.output(module)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(case.output(twin), expected)
            assert type(twin["layer"]) is type(module["layer"])  # pyright: ignore[reportIndexIssue]
            for factor in adapted_factors(twin):
                factor.data.zero_()
            assert not torch.equal(case.output(twin), expected)
            remove_lora(twin)
        assert torch.equal(case.output(module), expected)


def case_output(case: Case, module: nn.Module) -> Tensor:
    """Output in float32."""
    torch.manual_seed(7)
    inputs = tuple(map(to_float32, case.inputs()))
    with torch.no_grad():
        return first(module["layer"](*inputs))  # pyright: ignore[reportIndexIssue]


def to_float32(value: Any) -> Any:
    """A tensor, packed sequence or tuple of them in float32; anything else as it is."""
    if isinstance(value, (Tensor, PackedSequence)):
        return value.to(torch.float32)
    return tuple(map(to_float32, value)) if isinstance(value, tuple) else value


def adapted_factors(module: nn.Module) -> list[nn.Parameter]:
    """Every factor in a module."""
    return [factor for layer in lora_layers(module).values() for factor in layer.lora_factors().values()]


def numbers(*shape: int, seed: int = 5) -> Tensor:
    """Reproducible float64 inputs."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
