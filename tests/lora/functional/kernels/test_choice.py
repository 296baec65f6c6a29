"""A kernel is used where it was measured to be faster, and nowhere else."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_lora import ConfigError
from lightning_lora.lora.functional.kernels import choice

MEASURED = {"cpu": {"gate": {"bfloat16 silu 64": [8, 32]}}}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU takes the place of a GPU, as Triton's interpreter allows."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choice, "has_triton", lambda: True)
    monkeypatch.setattr(choice, "table", lambda: MEASURED)


def chosen(kernel: str = "gate", shape: str = "silu 64", rows: int = 16, dtype: torch.dtype = torch.bfloat16) -> bool:
    return choice.chosen(kernel, shape, rows, torch.ones(2, 2, dtype=dtype))


@pytest.mark.usefixtures("measured")
def test_a_kernel_is_used_between_the_fewest_and_the_most_rows_that_were_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [rows for rows in (1, 7, 8, 32, 33) if chosen(rows=rows)] == [8, 32]
    assert not chosen("narrow")
    assert not chosen(shape="silu 65")
    assert not chosen(dtype=torch.float16)
    monkeypatch.setattr(choice, "table", lambda: {"another device": MEASURED["cpu"]})
    assert not chosen()


@pytest.mark.usefixtures("measured")
def test_one_setting_decides_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.SETTING, "off")
    assert not chosen()
    monkeypatch.setenv(choice.SETTING, "all")
    assert chosen("narrow", "unmeasured", 1, torch.float32)
    monkeypatch.setenv(choice.SETTING, "on")
    with pytest.raises(ConfigError, match="LIGHTNING_LORA_KERNELS must be measured, off or all, got 'on'"):
        chosen()


@pytest.mark.usefixtures("measured")
def test_no_kernel_is_used_where_it_could_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.SETTING, "all")
    assert not chosen(rows=0)
    assert not chosen(dtype=torch.float64)

    class Subclass(Tensor):
        pass

    ones = torch.ones(2)
    with FakeTensorMode():
        fake = torch.ones(2)
    for other in (ones.as_subclass(Subclass), fake, ones.to("meta"), ones.double()):
        assert not choice.chosen("gate", "silu 64", 16, ones, other)
    assert choice.chosen("gate", "silu 64", 16, ones, ones)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not chosen()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    assert not chosen()


def test_the_shipped_table_is_well_formed() -> None:
    table = json.loads(choice.TABLE_FILE.read_text(encoding="utf-8"))
    for kernels in table.values():
        assert set(kernels) <= set(choice.KERNELS)
        for shapes in kernels.values():
            for shape, (fewest, most) in shapes.items():
                assert shape.split()[0] in ("float32", "bfloat16", "float16")
                assert 0 < fewest <= most
