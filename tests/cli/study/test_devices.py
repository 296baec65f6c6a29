from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from lightning_lora.cli.study import devices


def test_every_gpu_but_the_first_gets_a_worker_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], str]] = []

    def begin(command: list[str], env: dict[str, str]) -> Any:
        started.append((command, env[devices.VISIBLE]))

    monkeypatch.setattr(subprocess, "Popen", begin)
    monkeypatch.setenv(devices.VISIBLE, "2,5,7")
    assert devices.visible_devices() == ["2", "5", "7"]
    devices.start_workers(devices.visible_devices(), ["ranks.yaml", "--out", "out"], ["mine"])
    assert os.environ[devices.VISIBLE] == "2"
    assert [device for _, device in started] == ["5", "7"]
    program = [sys.executable, "-m", "lightning_lora", "--allow", "mine"]
    assert started[0][0] == [*program, "study", "ranks.yaml", "--out", "out", "--worker"]


def test_one_device_needs_no_other_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.VISIBLE, "3")
    assert devices.start_workers(devices.visible_devices(), [], []) == []
    monkeypatch.setenv(devices.VISIBLE, "")
    assert len(devices.visible_devices()) == devices.torch.cuda.device_count()
