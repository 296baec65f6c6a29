"""What the kernel is asked for when a checkpoint or an adapter is saved, and in which order (fault F22)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import warm

STRACE = shutil.which("strace")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(STRACE is None, reason="needs strace")]

SAVE = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from lightning_lora import LoRAConfig, inject_lora, save_adapter
from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO

module = torch.nn.Sequential(torch.nn.Linear(4, 4))
inject_lora(module, LoRAConfig(rank=2))
VerifiedCheckpointIO().save_checkpoint({"global_step": 1, "state_dict": module.state_dict()}, sys.argv[1] + "/a.ckpt")
save_adapter(module, sys.argv[1] + "/adapter")
"""
TRACED = "trace=write,pwrite64,fsync,fdatasync,rename,renameat,renameat2"


def calls(folder: Path) -> list[tuple[str, str, str]]:
    """``(write | fsync | rename, path, new name)`` of each call on something in ``folder``; repeated writes once."""
    trace = folder.parent / "trace.txt"
    command = [str(STRACE), "-f", "--seccomp-bpf", "-y", "-s", "256", "-e", TRACED]
    done = subprocess.run(
        [*command, "-o", str(trace), sys.executable, "-c", SAVE, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=warm.environment(),
    )
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip("tracing is not allowed here")
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[tuple[str, str, str]] = []
    for line in trace.read_text().splitlines():
        name = re.search(r"(write|pwrite64|fsync|fdatasync|rename\w*)\(", line)
        if name is None or str(folder) not in line:
            continue
        kind = {"pwrite64": "write", "fdatasync": "fsync"}.get(name[1], re.sub("rename.*", "rename", name[1]))
        paths = re.findall(rf"{re.escape(str(folder))}[^>\"]*", line)
        # A rename has two paths, everything else has the one it works on twice.
        call = (kind, paths[0], paths[-1] if kind == "rename" else "")
        if not found or found[-1] != call:
            found.append(call)
    return found


def test_a_file_is_written_and_synced_before_its_name_and_the_folder_after(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    found = calls(folder)
    renames = [(number, old, new) for number, (kind, old, new) in enumerate(found) if kind == "rename"]
    expected = {str(folder / name) for name in ("a.ckpt", "a.ckpt.manifest.json", "adapter")}
    assert expected <= {new for *_, new in renames}
    for number, old, new in renames:
        # The file itself, or all files of a folder.
        done = [(n, path) for n, (kind, path, _) in enumerate(found[:number]) if kind == "write"]
        writes = {path: n for n, path in done if path.startswith(old)}
        assert writes, found
        for path, last in writes.items():
            assert ("fsync", path, "") in found[last:number], path
        assert found[number + 1] == ("fsync", os.path.dirname(new), ""), found[number : number + 3]
