"""A kernel that is broken on purpose, at a mask, an offset or a sum, fails the checks of its tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import InterpreterError

from lightning_lora.lora.functional import kernels
from tests.lora.functional.kernels.under_interpreter import test_cross_entropy, test_gate, test_narrow
from tests.lora.functional.kernels.under_interpreter.memory import Memory

# Each mutation: what is right, and what is wrong, in one kernel or in all that have it.
MUTATIONS = {
    "gate": [
        ("inside = column < width", "inside = column < width + 1"),
        ("inside = column < width", "inside = column < width - 1"),
        ("tl.program_id(1) * BLOCK", "tl.program_id(1) * (BLOCK - 1)"),
        ("up + row * up_row", "up + row * gate_row"),
        ("d_gate + row * d_gate_row", "d_gate + row * gate_row"),
        ("share * (1 + gate * (1 - share))", "share * (1 + gate * share)"),
        ("* (1 + 0.134145 * gate * gate)", "* (1 + 0.044715 * gate * gate)"),
        ("tl.exp(-0.5 * gate * gate)", "tl.exp(-gate * gate)"),
        ("d * u * slope", "d * slope"),
        ("triton.cdiv(width, BLOCK)", "width // BLOCK"),
    ],
    "narrow": [
        ("row[:, None] < count", "row[:, None] < count + 1"),
        ("row[:, None] < count", "row[:, None] < count - 1"),
        ("column < out", "column < out + 1"),
        ("r[None, :] < rank", "r[None, :] < rank + 1"),
        ("block * ROWS", "block * (ROWS - 1)"),
        ("range(part * span, ", "range(part * span + 1, "),
        ("(block * out + column", "(column"),
        ("(part * count + row", "(row"),
        ("tl.dot(values, b, product,", "tl.dot(values, b, product * 0,"),
        ("column[:, None] * B_row", "column[:, None] * S_row"),
        ("product * scale", "product"),
        ("by_rows.sum(0)", "by_rows[0]"),
        ("by_columns.sum(0)", "by_columns[0]"),
    ],
    "cross_entropy": [
        ("mask=column < classes, other", "mask=column < classes + 1, other"),
        ("mask=column < classes)", "mask=column < classes - 1)"),
        ('other=-float("inf")', "other=0.0"),
        ("scores += row * scores_row", "scores += row * classes"),
        ("total * tl.exp(before - largest)", "total"),
        ("largest + tl.log(total)", "tl.log(total)"),
        ("column == label, 1.0", "column == label + 1, 1.0"),
        ("factor = tl.load(factors + row * factors_row)", "factor = tl.load(factors + row)"),
        ("labels + row * labels_row", "labels + row"),
        ("tl.where(is_kept, by_score, 0.0)", "by_score"),
        ("is_kept, factor * (log_sum - at_label), 0.0", "is_kept, factor * (log_sum - at_label), log_sum"),
        ("largest, total = -3.0e38, 0.0", 'largest, total = -float("inf"), 0.0'),
    ],
}


def check_gate(module: Any, memory: Memory) -> None:
    """Every activation, past a block; two tensors whose rows lie differently far apart."""
    for activation in test_gate.ACTIVATIONS:
        for halves in (True, False):
            gate, _ = test_gate.laid_out("halves", (3, 1100), torch.float32)
            test_gate.check(module, memory, activation, gate, torch.randn(3, 1100), True, halves)


def check_narrow(module: Any, memory: Memory) -> None:
    """Several blocks of rows and of columns, with one and with several blocks of columns to a program."""
    for programs in (1, 256):
        module._PROGRAMS = programs
        for layout in ("contiguous", "slices"):
            y, B, S = test_narrow.inputs((300, 150, 5), torch.float32, layout)
            test_narrow.check(module, memory, y, B.T.contiguous().T, S)


def check_cross_entropy(module: Any, memory: Memory) -> None:
    """Rows and labels that lie apart, classes without a chance, and ignored rows."""
    module.MAX_BLOCK = 16
    test_cross_entropy.check_layouts(module, memory)
    test_cross_entropy.check_hopeless(module, memory)


CHECKS: dict[str, Callable[[Any, Memory], None]] = {
    "gate": check_gate,
    "narrow": check_narrow,
    "cross_entropy": check_cross_entropy,
}


def loaded(source: str, path: Path, memory: Memory) -> Any:
    """A module of kernels with this source; Triton reads it from a file."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("mutated", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.uninitialised = memory.uninitialised
    return module


@pytest.mark.parametrize(
    ("name", "right", "wrong"), [(name, *pair) for name, pairs in MUTATIONS.items() for pair in pairs]
)
def test_a_broken_kernel_is_found(name: str, right: str, wrong: str, tmp_path: Path, memory: Memory) -> None:
    source = Path(kernels.__path__[0], f"{name}.py").read_text(encoding="utf-8")
    assert right in source, f"{name}.py has changed: write down anew how to break it"
    module = loaded(source.replace(right, wrong), tmp_path / f"{name}.py", memory)
    with pytest.raises((AssertionError, InterpreterError)):
        CHECKS[name](module, memory)


@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_pass_on_what_is_not_broken(name: str, tmp_path: Path, memory: Memory) -> None:
    source = Path(kernels.__path__[0], f"{name}.py").read_text(encoding="utf-8")
    CHECKS[name](loaded(source, tmp_path / f"{name}.py", memory), memory)
