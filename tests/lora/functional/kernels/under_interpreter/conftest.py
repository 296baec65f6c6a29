"""Kernels are used on every shape, and whatever they touch beside their tensors is seen."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod
from typing import Any

import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from lightning_lora.lora.functional.kernels import choice, cross_entropy, gate, narrow
from tests.lora.functional.kernels.under_interpreter.memory import Memory


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """Where kernels may read and write in this test: in the tensors that it allows, and in those that they make."""
    memory = Memory()
    for module in (gate, narrow, cross_entropy):
        monkeypatch.setattr(module, "uninitialised", memory.uninitialised)
    for name, checked in (("create_masked_load", memory.load), ("create_masked_store", memory.store)):
        monkeypatch.setattr(
            InterpreterBuilder, name, partialmethod(checked_call, checked, getattr(InterpreterBuilder, name))
        )
    yield memory
    assert memory.touched, "no kernel was run"


def checked_call(builder: Any, checked: Any, as_it_is: Any, *arguments: Any) -> Any:
    """A method of the interpreter by way of one that looks at its arguments first."""
    return checked(builder, as_it_is, *arguments)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """NumPy, which computes here, warns where a sigmoid is 0 because an exponential is infinite."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"))


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton 3.9 multiplies the bits of bfloat16 matrices as if they were integers."""
    as_it_is: Any = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.create_fp_ext(each, tl.float32) for each in (a, b))
        return as_it_is(self, a, b, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.SETTING, "all")
