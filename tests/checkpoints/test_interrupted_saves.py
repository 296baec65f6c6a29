"""A save that fails or is killed leaves the old checkpoint or the new one, and a manifest that agrees with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO
from lightning_lora.files.checkpoint_manifest import SUFFIX, read_manifest
from tests.support import toys
from tests.support.verified_files import names, saved

pytestmark = toys.expected_warnings


def test_an_error_in_the_middle_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    io = VerifiedCheckpointIO()
    path = saved(tmp_path / "a.ckpt", 4, io)
    for target in (path, tmp_path / "new.ckpt"):
        with pytest.raises(Exception, match=r"pickle|local object"):
            saved(target, 8, io, bad=lambda: 0)
    assert names(tmp_path) == ["a.ckpt", f"a.ckpt{SUFFIX}"]
    assert io.load_checkpoint(path)["global_step"] == 4


def test_the_previous_manifest_is_kept_until_the_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    TorchCheckpointIO().save_checkpoint({"global_step": 1}, path)
    saved(path, 2, VerifiedCheckpointIO())
    (version,) = read_manifest(path)
    assert version.step == 2


MOMENTS = """
import os, signal, sys, warnings
from pathlib import Path
from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO
from lightning_lora.files.checkpoint_manifest import examine

warnings.simplefilter("ignore")  # of what the killed ones have left
seen, deadly = [], [0]

def on_event(event, arguments):
    if event == "os.rename" and deadly[0]:
        seen.append(arguments[1])
        if len(seen) == deadly[0]:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(on_event)
folder = Path(sys.argv[1])
for existing in (True, False):
    path = folder / f"{existing}.ckpt"
    for rename in (1, 2, 3, 4):
        io = VerifiedCheckpointIO()
        if existing:
            io.save_checkpoint({"global_step": 0}, path)
        elif path.exists():
            io.remove_checkpoint(path)
        pid = os.fork()
        if pid == 0:
            deadly[0] = rename
            io.save_checkpoint({"global_step": rename}, path)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        step = None
        if path.exists():
            finding = examine(path)
            step = finding.damage or (finding.version and finding.version.step)
        print(existing, rename, killed, step)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_before_each_rename_the_file_and_its_manifest_agree(tmp_path: Path) -> None:
    lines = toys.run_python(MOMENTS, tmp_path).stdout.splitlines()
    assert lines == [
        "True 1 True 0",  # before the manifest of both
        "True 2 True 0",  # before the file
        "True 3 True 3",  # before the manifest of the new one alone
        "True 4 False 4",
        "False 1 True None",
        "False 2 True None",
        "False 3 False 3",
        "False 4 False 4",
    ]


FULL = """
import resource, sys, torch
from pathlib import Path
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO

io = {"ours": VerifiedCheckpointIO, "lightning": TorchCheckpointIO}[sys.argv[2]]()
path = Path(sys.argv[1]) / "last.ckpt"
io.save_checkpoint({"global_step": 1, "state_dict": {"x": torch.ones(100_000)}}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
try:
    io.save_checkpoint({"global_step": 2, "state_dict": {"x": torch.ones(1_000_000)}}, path)
except OSError as error:
    print(type(error).__name__, error)
print(sorted(entry.name for entry in path.parent.iterdir()))
try:
    print(io.load_checkpoint(path)["global_step"])
except Exception as error:
    print("lost:", type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_full_disk_ends_the_save_with_numbers_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    error, left, step = toys.run_python(FULL, tmp_path, "ours").stdout.splitlines()
    assert error.startswith("OSError [Errno 27] File too large: a checkpoint needs about 4.0 MB, ")
    assert "MB are free on the disk. Earlier checkpoints are untouched: " in error
    assert left == str(["last.ckpt", f"last.ckpt{SUFFIX}"])
    assert step == "1"
