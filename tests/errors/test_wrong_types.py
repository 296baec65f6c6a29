"""Every public name, called with an argument of a wrong type: one of our errors, which names the argument."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import lightning_lora
from lightning_lora import (
    LoRAConfig,
    LoRAError,
    disable_lora,
    inject_lora,
    lora_state_dict,
    save_adapter,
)
from lightning_lora.callbacks import BatchSizeMonitor
from lightning_lora.errors import check_arguments
from lightning_lora.errors.arguments import described, is_a
from tests.support.toys import Net, Toy

pytestmark = pytest.mark.filterwarnings("ignore")
ROOMS = ("lightning_lora", "lightning_lora.callbacks", "lightning_lora.data", "lightning_lora.tasks")
# Results, which this package makes; the mixin and plans, whose classes and arguments have tests of their own.
LEFT_OUT = {"InjectionReport", "LoRAMixin", "MergeReport", "NoiseScale", "ParameterCount", "Plan"}


def adapted() -> nn.Module:
    module = Net()
    inject_lora(module, LoRAConfig(rank=1))
    return module


def arguments(name: str, folder: Path) -> dict[str, Any]:
    """Good arguments where a call needs some."""
    adapter = adapted()
    known: dict[str, dict[str, Any]] = {
        "inject_lora": {"module": Net(), "config": LoRAConfig(rank=1)},
        "load_lora_state_dict": {"module": adapter, "state": lora_state_dict(adapter)},
        "load_adapter": {"module": adapter, "path": folder},
        "save_adapter": {"module": adapter, "path": folder / "adapter"},
        "matched_rank": {"module": Net(), "targets": "all", "like": LoRAConfig(rank=1)},
        "noise_scale": {"gradients": torch.ones(3, 4), "batch_sizes": 1},
        "register_layer": {"module_type": nn.Linear, "adapter_type": nn.Linear},
        "register_role": {"pattern": "layer", "role": "mlp"},
        "plan": {"model": str(folder), "datamodule": "rows.jsonl"},
        "Study": {"module": Net, "data": None, "arms": {"a": {}, "b": {}}, "learning_rates": 0.1},
        "SequenceClassifier": {"model": str(folder), "num_labels": 2},
    }
    return known.get(name, {"module": adapter} if name in vars(lightning_lora)["__all__"] else {"model": str(folder)})


def call(called: Callable[..., Any], given: dict[str, Any]) -> None:
    if called is disable_lora:  # which does nothing before it is entered
        called(**given).__enter__()
    else:
        called(**given)


def parameters() -> Iterator[Any]:
    for room in ROOMS:
        module: Any = importlib.import_module(room)
        for name in sorted(set(module.__all__) - LEFT_OUT):
            called = getattr(module, name)
            if inspect.isclass(called) and issubclass(called, Exception):
                continue
            for parameter in inspect.signature(called).parameters.values():
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    yield pytest.param(called, parameter, id=f"{name}-{parameter.name}")


def wrong(annotation: str, default: object) -> list[Any]:
    """Values of no type that ``annotation`` names."""
    values: list[Any] = [object(), [object()]]
    if annotation in ("int", "float", "bool", "nn.Module", "int | None", "float | None"):
        values += ["8", float("nan")]
    if annotation in ("bool", "str", "nn.Module", "LoRAConfig", "str | None", "str | Path"):
        values.append(3)
    if annotation in ("int", "float", "nn.Module"):
        values += [True, Path("a")]
    return values if default is None or "None" in annotation else [None, *values]


@pytest.mark.parametrize(("called", "parameter"), list(parameters()))
def test_an_argument_of_a_wrong_type_is_refused_by_name(
    called: Callable[..., Any], parameter: inspect.Parameter, llama_folder: Path, tmp_path: Path
) -> None:
    accepted = set(inspect.signature(called).parameters)
    for value in wrong(str(parameter.annotation), parameter.default):
        given = arguments(called.__name__, llama_folder)
        given = {name: each for name, each in given.items() if name in accepted} | {parameter.name: value}
        with pytest.raises(LoRAError) as caught:
            call(called, given)
        assert parameter.name.split("_")[0] in str(caught.value), f"{value!r}: {caught.value}"


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [
        (1, float, True),
        (True, int, False),
        (numpy.int64(1), int, True),
        (numpy.float32(1), float, True),
        (1.0, int, False),
        (True, float, False),
        (float("nan"), float, False),
        ("ab", list[str], False),
        (("a", "b"), list[str], True),
        (["a", 1], list[str], False),
        (Path("a"), str | None, True),
        ({"a": 1}, dict[str, int], True),
        ({1: 1}, dict[str, int], False),
        (len, Callable[..., Any], True),
        (None, int, False),
    ],
)
def test_what_counts_as_a_type(value: Any, kind: Any, fits: bool) -> None:
    assert is_a(value, kind) is fits


def test_a_message_says_what_may_be_given() -> None:
    def function(rows: int | list[str] | dict[str, float] | None, *args: int, **others: int) -> None:
        check_arguments(function, locals())

    function(3)
    words = "a whole number or a list of texts or a mapping from a text to a number or None"
    assert described(int | list[str] | dict[str, float] | None) == words
    with pytest.raises(LoRAError, match=rf"rows must be {words}, got 0.5"):
        function(0.5)  # type: ignore[arg-type]


METHODS: dict[str, tuple[Callable[[], Any], str]] = {
    "use_step_memory": (lambda: Toy().use_step_memory(3), "step_memory must be a StepMemory, a mapping or None"),  # type: ignore[arg-type]
    "lora_root": (lambda: Toy(lora_root=3).apply_lora(), "lora_root 3 is not a submodule of Toy"),
    "save_adapter": (lambda: Toy().save_adapter(None), "path must be a text or a path, got None"),  # type: ignore[arg-type]
    "parameter groups": (lambda: Toy().lora_parameter_groups("1"), "learning_rate must be a finite number"),  # type: ignore[arg-type]
    "calibrate": (lambda: BatchSizeMonitor().calibrate(None, "1"), "calibration must be a positive number, got 1"),  # type: ignore[arg-type]
    "tokenizer": (lambda: save_adapter(adapted(), "a", tokenizer=3), "tokenizer must be a tokenizer of transformers"),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_refuse_what_they_cannot_use(name: str) -> None:
    call_it, message = METHODS[name]
    with pytest.raises(LoRAError, match=message):
        call_it()
