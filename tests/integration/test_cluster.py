"""The scripts for several machines, run as two machines of one process each, compute what one device computes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import toys
from tests.support.commands import CONFIGS, EMBEDDED, configs, lightning_lora
from tests.support.warm import free_port

pytestmark = pytest.mark.slow

SLURM, TORCHRUN = CONFIGS / "cluster" / "slurm.sh", CONFIGS / "cluster" / "torchrun.sh"
NUM_EPOCHS = 6
"""Of one step each, on all eight rows: their order is then of no account."""
LIMIT = 200


def arguments(strategy: str, batch_size: int = 4, num_epochs: int = NUM_EPOCHS) -> list[str]:
    # Eight of the ten are short enough. Of an odd number the sampler would give one to both processes.
    options = [f"--data.init_args.batch_size={batch_size}", "--data.init_args.max_rows=10"]
    options += [f"--trainer.max_epochs={num_epochs}", "--trainer.val_check_interval=1"]
    return [*configs("sft.yaml", "lora.yaml", f"strategy/{strategy}"), *EMBEDDED, *options]


def start(script: Path, folder: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """``bash SCRIPT OPTIONS`` in ``folder``, with our commands and the stand-in for srun on the path."""
    path = f"{Path(__file__).parent / 'scripts'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    ours = {"PATH": path, "PYTHONPATH": str(toys.ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        ["bash", str(script), *options],
        cwd=folder,
        env=os.environ | ours | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was printed."""
    try:
        printed, _ = process.communicate(timeout=LIMIT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, printed


def free_port_from(port: int) -> int:
    while True:
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", port)):
                return port
        port += 1


def job() -> dict[str, str]:
    """What SLURM tells a job of slurm.sh, from the directives in it."""
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", SLURM.read_text(), re.MULTILINE))
    assert asked["signal"].startswith("TERM@")
    nodes, per_node = asked["nodes"], asked["ntasks-per-node"]
    return {
        # Lightning makes the port from its last digits.
        "SLURM_JOB_ID": f"77{free_port_from(15000) - 15000:04}",
        "SLURM_JOB_NAME": asked["job-name"],
        "SLURM_NNODES": nodes,
        "SLURM_NTASKS_PER_NODE": per_node,
        "SLURM_NTASKS": str(int(nodes) * int(per_node)),
        "SLURM_NODELIST": "127.0.0.[1-2]",
    }


def assert_same_adapter(folder: Path, expected: Path) -> None:
    found, wanted = (load_file(where / "adapters/last/adapter_model.safetensors") for where in (folder, expected))
    assert any(tensor.abs().max() > 1e-3 for name, tensor in wanted.items() if "lora_B" in name)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # By norm: AdamW turns the rounding of a gradient near zero into part of a step, so single entries differ more.
        torch.testing.assert_close((found[name] - tensor).norm() / tensor.norm(), torch.tensor(0.0), rtol=0, atol=1e-4)


def run_folder(folder: Path, version: int = 0) -> Path:
    return folder / "runs" / "sft" / f"version_{version}"


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one device."""
    folder = tmp_path_factory.mktemp("one")
    done = lightning_lora("fit", *arguments("single.yaml", batch_size=8), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_folder(folder)


def test_torchrun_on_two_machines_equals_one_device(one_device: Path, tmp_path: Path) -> None:
    cluster = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NPROC_PER_NODE": "1"}
    nodes = [start(TORCHRUN, tmp_path, *arguments("fsdp2.yaml"), **cluster, NODE_RANK=str(rank)) for rank in (0, 1)]
    for code, printed in [end(node) for node in nodes]:
        assert code == 0, printed[-4000:]
    assert_same_adapter(run_folder(tmp_path), one_device)


def test_a_slurm_job_that_runs_out_of_time_goes_on_in_the_next_and_equals_one_device(
    one_device: Path, tmp_path: Path
) -> None:
    first = start(SLURM, tmp_path, *arguments("ddp.yaml", num_epochs=10_000), **job())
    deadline = time.monotonic() + LIMIT
    while not list(run_folder(tmp_path).glob("checkpoints/*.ckpt")):
        assert first.poll() is None, end(first)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    code, printed = end(first)
    assert code == 143, printed[-4000:]
    stopped = run_folder(tmp_path) / "checkpoints" / "stopped.ckpt"
    assert torch.load(stopped, weights_only=True)["global_step"] < NUM_EPOCHS - 1
    code, printed = end(start(SLURM, tmp_path, *arguments("ddp.yaml"), f"--ckpt_path={stopped}", **job()))
    assert code == 0, printed[-4000:]
    assert_same_adapter(run_folder(tmp_path, 1), one_device)
