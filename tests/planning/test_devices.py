"""Devices are those at hand or those that were named, and a size that cannot be read is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.errors import ConfigError
from lightning_lora.memory import room
from lightning_lora.planning.device_table import DATA_SHEETS, sheet_of
from lightning_lora.planning.devices import find_devices, machine_memory, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24 GB", 24 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5 tib", 3 * 2**39),
        (" 7kb ", 7000),
        ("9B", 9),
    ],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("24", "has no unit: write 24GiB"),
        (24, "has no unit"),
        ("24G", "unknown unit 'G': write 24GiB .* or 24GB"),
        ("3 apples", "unknown unit 'apples'"),
        ("0GiB", "above zero"),
        ("-3GiB", "above zero"),
        ("0.1B", "above zero"),
        ("GiB", "number with a unit"),
        ("", "number with a unit"),
        ("nanGiB", "number with a unit"),
        ("1e3GiB", "number with a unit"),
        (True, "number with a unit"),
    ],
)
def test_other_sizes_are_refused(text: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_bytes(text)


def test_named_memory_is_a_device_of_which_nothing_else_is_known() -> None:
    found = find_devices("24GiB", 2)
    assert (found.memory, found.count, found.is_here) == (24 * 2**30, 2, False)
    assert not found.device.flops
    assert found.device.bandwidth is None


def test_a_listed_device_has_its_data_sheet_and_may_have_another_memory() -> None:
    found = find_devices("40GiB", name="NVIDIA H100")
    assert found.memory == 40 * 2**30
    assert found.device.flops["bfloat16"] == pytest.approx(989.4e12)
    assert find_devices(name="RTX 4090").device.name == "rtx4090"
    assert find_devices(name="h100", efficiency=0.5).device.efficiency == 0.5
    assert "bfloat16" not in find_devices(name="t4").device.flops


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="it is about the CPU")
def test_without_a_name_the_devices_are_those_at_hand() -> None:
    found = find_devices()
    assert (found.device.kind, found.count, found.is_here) == ("cpu", 1, True)
    assert found.memory == machine_memory()
    assert not find_devices(count=2).is_here


def test_a_container_may_have_less_memory_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CGROUPS", ((tmp_path, "limit", "used", "droppable"),))
    whole = machine_memory()
    (tmp_path / "limit").write_text("max\n")
    assert machine_memory() == whole > 2**20
    (tmp_path / "limit").write_text(f"{2**20}\n")
    assert machine_memory() == 2**20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "devices must be a whole number of 1 or more, got 0"),
        ({"count": True}, "whole number"),
        ({"count": 1.5}, "whole number"),
        ({"name": "h1000"}, "'h1000' is not in the table .*did you mean .*'h100'"),
        ({"name": "h100", "efficiency": 0}, "efficiency must be a number above 0"),
        ({"name": "h100", "efficiency": 35}, "at most 1, got 35"),
        ({"name": "h100", "peak_tflops": 0}, "peak_tflops must be a number above 0"),
        ({"name": "h100", "bandwidth": "3350"}, "bandwidth '3350' has no unit"),
        ({"name": "h100", "bandwidth": "fast"}, "bandwidth must be a number with a unit"),
    ],
)
def test_wrong_devices_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_devices(**options)


@pytest.mark.parametrize(
    ("driver_name", "listed"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
    ],
)
def test_a_driver_name_is_found_in_the_table(driver_name: str, listed: str | None) -> None:
    assert sheet_of(driver_name) == listed


def test_every_data_sheet_finds_itself() -> None:
    assert all(sheet_of(" ".join(sorted(sheet.words))) == name for name, sheet in DATA_SHEETS.items())
