"""Two processes train what one device trains, and their checkpoints go anywhere."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter, lora_state_dict, merge_lora
from lightning_lora.tasks import CausalLM
from tests import toys
from tests.integration import two_processes

pytestmark = [pytest.mark.slow, *toys.expected_warnings]

SCRIPT = Path(two_processes.__file__)
TASKS, STRATEGIES = ("toy", "llm"), ("ddp", "fsdp2")


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def run(task: str, strategy: str, folder: Path, ckpt_path: Path | None = None) -> Path:
    """The folder of the run; both processes are gone when this returns."""
    out = folder / f"{task}-{strategy}"
    environment = {
        "PYTHONPATH": str(toys.ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MASTER_PORT": free_port(),
    }
    arguments = [task, strategy, str(folder), *([] if ckpt_path is None else [str(ckpt_path)])]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return out


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the llama in it and the runs of one device."""
    folder = tmp_path_factory.mktemp("distributed")
    toys.save_llama(folder / "llama")
    for task in TASKS:
        two_processes.run(task, "single", folder)
    return folder


def content(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found["state_dict"]) == list(expected["state_dict"])
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=1e-5, atol=1e-5)
    (one,), (other,) = found["optimizer_states"], expected["optimizer_states"]
    assert [group["params"] for group in one["param_groups"]] == [group["params"] for group in other["param_groups"]]
    torch.testing.assert_close(one["state"], other["state"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_equal_one_device_and_their_checkpoint_resumes_on_it(
    task: str, strategy: str, folder: Path, tmp_path: Path
) -> None:
    out, reference = run(task, strategy, folder), folder / f"{task}-single"
    for name in ("half.ckpt", "end.ckpt"):
        assert (out / name).is_file()
        assert_close(content(out / name), content(reference / name))
    assert not [name for name in content(out / "end.ckpt")["state_dict"] if "lora_" not in name and "head" not in name]
    (tmp_path / "llama").symlink_to(folder / "llama")
    two_processes.run(task, "single", tmp_path, out / "half.ckpt")
    assert_close(content(tmp_path / f"{task}-single" / "end.ckpt"), content(reference / "end.ckpt"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_of_one_device_resumes_on_two_processes(strategy: str, folder: Path, tmp_path: Path) -> None:
    reference = folder / "toy-single"
    out = run("toy", strategy, tmp_path, reference / "half.ckpt")
    assert_close(content(out / "end.ckpt"), content(reference / "end.ckpt"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapter_folders_written_by_two_processes_load_on_one(strategy: str, folder: Path) -> None:
    out = folder / f"llm-{strategy}"
    if not out.exists():
        run("llm", strategy, folder)
    module = CausalLM(str(folder / "llama"))
    module.configure_model()
    load_adapter(module, out / "adapters" / "last")
    assert toys.same(lora_state_dict(module), content(out / "final.pt"))
    assert (out / "adapters" / "best" / "adapter_model.safetensors").is_file()
    if strategy == "ddp":
        merge_lora(module)
        merged = CausalLM(str(out / "merged"))
        merged.configure_model()
        assert toys.same(toys.base_of(module), toys.snapshot(merged))
