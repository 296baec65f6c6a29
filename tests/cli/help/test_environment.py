"""What `env` tells, and what it keeps to itself."""

from __future__ import annotations

import getpass
import platform
from pathlib import Path

import pytest
import torch

from lightning_lora.cli import main


def test_it_names_versions_machine_and_settings_and_nobody(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LIGHTNING_LORA_KERNELS", "off")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert main.main(["env"]) == 0
    printed = capsys.readouterr().out
    told = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert told["python"] == platform.python_version()
    assert told["torch"].startswith(torch.__version__.partition("+")[0])
    assert told["LIGHTNING_LORA_KERNELS"] == "off"
    assert told["OMP_NUM_THREADS"] == "1"
    assert {"lightning-lora", "lightning", "transformers", "system", "memory"} <= told.keys()
    for private in ("secret", str(Path.home()), f" {getpass.getuser()}", platform.node()):
        assert private not in printed


def test_gpus_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory, major, minor = "NVIDIA H100 80GB HBM3", 85_000_000_000, 9, 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert main.main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "gpu 0            NVIDIA H100 80GB HBM3, 79.2 GiB, sm_90" in printed
    assert "torch-build      CUDA 12.8" in printed
