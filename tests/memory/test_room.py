"""The memory that a step may take is what the driver or the operating system leaves, and what the step has already."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora.memory import room
from lightning_lora.memory.room import Room, bytes_between_steps, room_for_step, tensors_of_step

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HELD = [torch.zeros(250)]  # 1,000 bytes
GIB = 2**30


def machine(folder: Path, available: int, mapped: int = 0) -> Path:
    """A ``/proc`` of a machine with so many bytes available."""
    (folder / "self").mkdir(parents=True)
    (folder / "self" / "statm").write_text(f"{mapped // 4096} 1 1 1 0 1 0\n")
    (folder / "meminfo").write_text(f"MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   {available // 1024} kB\n")
    return folder


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resource: Any = pytest.importorskip("resource", reason="Windows has no such limits")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    monkeypatch.setattr(room, "_CGROUPS", ())
    monkeypatch.setattr(room, "_PROC", machine(tmp_path / "proc", 8 * GIB, mapped=GIB))


@pytest.mark.usefixtures("unlimited")
def test_a_machine_without_limits_has_what_is_available_and_refuses_nothing() -> None:
    assert room_for_step(CPU, HELD) == Room(8 * GIB + 1000, is_limit=False)


@pytest.mark.usefixtures("unlimited")
def test_a_limit_of_the_address_space_counts_from_what_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (3 * GIB, 3 * GIB))
    assert room_for_step(CPU, HELD) == Room(2 * GIB + 1000, is_limit=True)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (30 * GIB, 30 * GIB))
    assert room_for_step(CPU, HELD) == Room(8 * GIB + 1000, is_limit=False)


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize(("limit", "left"), [(f"{4 * GIB}", 2 * GIB), ("max", None), (f"{2**63 - 4096}", None)])
def test_a_container_has_what_its_limit_leaves_without_pages_that_can_be_dropped(
    limit: str, left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "memory.max": limit,
        "memory.current": f"{3 * GIB}",
        "memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
    }.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(
        room,
        "_CGROUPS",
        ((tmp_path, "memory.max", "memory.current", "inactive_file"), (tmp_path / "no", "a", "b", "c")),
    )
    expected = Room(8 * GIB + 1000, is_limit=False) if left is None else Room(left + 1000, is_limit=True)
    assert room_for_step(CPU, HELD) == expected


@pytest.mark.usefixtures("unlimited")
def test_a_system_that_does_not_tell_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_PROC", tmp_path / "none")
    assert room_for_step(CPU, HELD) is None
    assert room_for_step(torch.device("meta"), HELD) is None


@pytest.mark.parametrize(("share", "expected"), [(1.0, 9_000), (0.5, 6_000)])
def test_a_gpu_has_what_is_free_and_what_torch_has_reserved_but_for_tensors_of_others(
    share: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free are 6,000 of 16,000 bytes; torch has reserved 5,000 and allocated 3,000, of which the step has 1,000.

    A process that may take half of the device has 5,000 of its 8,000 left.
    """
    held: Any = [SimpleNamespace(device=GPU, nbytes=1_000), torch.zeros(9)]
    answers: dict[str, Any] = {"mem_get_info": (6_000, 16_000), "memory_reserved": 5_000, "memory_allocated": 3_000}
    answers["get_per_process_memory_fraction"] = share
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert room_for_step(GPU, held) == Room(expected, is_limit=True)


def test_a_step_has_weights_gradients_and_the_state_of_its_optimizer() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4, affine=False))
    frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
    module.append(frozen)
    assert bytes_between_steps(module) == 4 * (16 * 4 + 64) + 4 * 8 + 8
    optimizer = torch.optim.Adam(module[0].parameters())
    module[0](torch.ones(2, 4)).sum().backward()
    optimizer.step()
    held = list(tensors_of_step(module, [optimizer]))
    shapes = sorted(tuple(tensor.shape) for tensor in held)
    assert shapes == [(), (), (4,), (4,), (4, 4), (4, 4), (4, 4), (4, 4), (8, 8)]
