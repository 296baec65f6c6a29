"""Checkpoints are verified before they are used, and a damaged one is never loaded."""

from __future__ import annotations

import json
import logging
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_lora.callbacks import CheckpointGuard
from lightning_lora.checkpoints.fallback import choose_checkpoint
from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO
from lightning_lora.errors import AdapterFileError
from lightning_lora.files.atomic import sha256
from lightning_lora.files.checkpoint_manifest import (
    SUFFIX,
    CheckpointVersion,
    examine,
    manifest_of,
    read_manifest,
    write_manifest,
)
from tests.support import toys
from tests.support.toys import Toy

pytestmark = toys.expected_warnings


def runner(folder: Path, *callbacks: Any, io: Any = None, **options: Any) -> Trainer:
    """A trainer that keeps every epoch, and the last."""
    keep = ModelCheckpoint(folder / "kept", filename="{step}", save_last=True, save_top_k=-1)
    settings = {"enable_checkpointing": True, "callbacks": [*callbacks, *([] if callbacks else [keep])]}
    return toys.trainer(folder, plugins=[VerifiedCheckpointIO() if io is None else io], **(settings | options))


def fitted(folder: Path, *callbacks: Any, ckpt_path: Path | None = None, epochs: int = 2, **options: Any) -> Trainer:
    trainer = runner(folder, *callbacks, max_epochs=epochs, **options)
    trainer.fit(Toy(), toys.loader(), ckpt_path=ckpt_path)
    return trainer


def flip(path: Path, where: float = 0.5) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def saved(path: Path, step: int, io: VerifiedCheckpointIO, **more: Any) -> Path:
    io.save_checkpoint({"global_step": step, "epoch": 0, "optimizer_states": [], "x": torch.ones(9)} | more, path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_every_checkpoint_has_a_manifest_that_agrees_with_it(tmp_path: Path) -> None:
    fitted(tmp_path)
    folder = tmp_path / "kept"
    files = ["last.ckpt", "step=4.ckpt", "step=8.ckpt"]
    assert names(folder) == sorted([*files, *(name + SUFFIX for name in files)])
    for name, step in zip(files, (8, 4, 8), strict=True):
        content = json.loads(manifest_of(folder / name).read_bytes())
        (version,) = content["versions"]
        assert version["sha256"] == sha256(folder / name)
        assert version["size"] == (folder / name).stat().st_size
        assert version["step"] == step
        assert set(content["libraries"]) == {"lightning-lora", "lightning", "torch"}
        assert examine(folder / name).damage is None


def test_what_is_written_is_what_lightning_writes(tmp_path: Path) -> None:
    content = {
        "state_dict": {"a": torch.arange(7.0), "b": torch.zeros(2, 3)},
        "global_step": 3,
        "hyper": {"x": [1, "y"]},
    }
    VerifiedCheckpointIO().save_checkpoint(content, tmp_path / "ours.ckpt")
    TorchCheckpointIO().save_checkpoint(content, tmp_path / "theirs.ckpt")
    ours, theirs = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("ours", "theirs"))
    assert str(ours) == str(theirs)


def test_resuming_through_it_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    whole, resumed = Toy(), Toy()
    toys.trainer(tmp_path, max_epochs=2).fit(whole, toys.loader())
    torch.manual_seed(0)
    fitted(tmp_path, epochs=1)
    runner(tmp_path, max_epochs=2).fit(resumed, toys.loader(), ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))


DAMAGES = {
    "one bit at the start": (lambda path: flip(path, 0.01), "its SHA-256 is .*its manifest says"),
    "one bit in the middle": (flip, "its SHA-256 is .*its manifest says"),
    "one bit at the end": (lambda path: flip(path, 0.999), "its SHA-256 is .*its manifest says"),
    "cut in half": (cut, r"it has [0-9,]+ bytes, its manifest says [0-9,]+"),
    "one byte short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "it has .* bytes"),
    "empty": (lambda path: path.write_bytes(b""), "it has 0 bytes"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "it has .* bytes"),
    "manifest of another file": (
        lambda path: write_manifest(path, [CheckpointVersion("0" * 64, path.stat().st_size)]),
        "its SHA-256",
    ),
    "manifest no JSON": (
        lambda path: manifest_of(path).write_text("{"),
        "its manifest a.ckpt.manifest.json is damaged",
    ),
    "manifest a list": (lambda path: manifest_of(path).write_text("[]"), "its manifest .* is damaged"),
    "manifest of nothing": (
        lambda path: manifest_of(path).write_text('{"format": 1, "versions": []}'),
        "its manifest .* is damaged",
    ),
    "manifest of words": (
        lambda path: manifest_of(path).write_text('{"format": 1, "versions": [{"sha256": 1, "size": "x"}]}'),
        "its manifest .* is damaged",
    ),
    "manifest empty": (lambda path: manifest_of(path).write_text(""), "its manifest .* is damaged"),
}


@pytest.mark.parametrize(("injure", "text"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_refused_where_nothing_is_beside_it(injure: Any, text: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", 4, VerifiedCheckpointIO())
    assert VerifiedCheckpointIO().load_checkpoint(path)["global_step"] == 4
    injure(path)
    with pytest.raises(AdapterFileError, match=f"a.ckpt is damaged: {text}.*holds no whole checkpoint"):
        VerifiedCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("signed", [True, False])
def test_a_file_cut_anywhere_is_damaged(signed: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", 4, VerifiedCheckpointIO(), more=torch.randn(500))
    content = path.read_bytes()
    if not signed:
        manifest_of(path).unlink()
    for length in random.Random(0).sample(range(len(content)), 20):
        path.write_bytes(content[:length])
        assert examine(path).damage is not None, length


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_resuming_from_a_damaged_checkpoint_goes_on_from_the_last_whole_one(tmp_path: Path) -> None:
    fitted(tmp_path)
    folder = tmp_path / "kept"
    flip(folder / "last.ckpt")
    cut(folder / "step=8.ckpt")
    injured = {name: (folder / name).read_bytes() for name in ("last.ckpt", "step=8.ckpt")}
    resumed, expected = Toy(), Toy()
    with pytest.warns(
        UserWarning, match=r"last.ckpt is damaged: its SHA-256.*Loading .*step=4.ckpt \(step 4\) instead"
    ):
        toys.trainer(tmp_path, plugins=[VerifiedCheckpointIO()], max_epochs=3).fit(
            resumed, toys.loader(), ckpt_path=folder / "last.ckpt"
        )
    toys.trainer(tmp_path, max_epochs=3).fit(expected, toys.loader(), ckpt_path=folder / "step=4.ckpt")
    assert toys.same(toys.snapshot(resumed), toys.snapshot(expected))
    assert injured == {name: (folder / name).read_bytes() for name in injured}


def test_whole_checkpoint_loads_without_a_word(tmp_path: Path) -> None:
    fitted(tmp_path, epochs=1)
    fitted(tmp_path, ckpt_path=tmp_path / "kept" / "step=4.ckpt")  # a warning would be an error


def test_the_step_decides_what_is_last_and_not_the_clock(tmp_path: Path) -> None:
    io = VerifiedCheckpointIO()
    for step in (30, 10, 20, 40):
        saved(tmp_path / f"{step}.ckpt", step, io)
        os.utime(tmp_path / f"{step}.ckpt", (time.time() - step, time.time() - step))
    flip(tmp_path / "40.ckpt")
    with pytest.warns(UserWarning, match=r"40.ckpt is damaged.*30.ckpt \(step 30\)"):
        assert io.load_checkpoint(tmp_path / "40.ckpt")["global_step"] == 30
    flip(tmp_path / "30.ckpt")
    with pytest.warns(UserWarning, match=r"30.ckpt is damaged.*20.ckpt \(step 20\)"):
        assert io.load_checkpoint(tmp_path / "30.ckpt")["global_step"] == 20


def test_a_later_checkpoint_does_not_stand_for_an_earlier_one(tmp_path: Path) -> None:
    io = VerifiedCheckpointIO()
    early, _ = (saved(tmp_path / f"{step}.ckpt", step, io) for step in (10, 20))
    flip(early)
    with pytest.raises(AdapterFileError, match=r"10.ckpt is damaged.*no whole checkpoint that could stand for it"):
        io.load_checkpoint(early)


def test_another_run_in_the_folder_does_not_stand_for_this_one(tmp_path: Path) -> None:
    saved(tmp_path / "other.ckpt", 10, VerifiedCheckpointIO())
    path = saved(tmp_path / "mine.ckpt", 20, VerifiedCheckpointIO())
    flip(path)
    with pytest.raises(AdapterFileError, match="no whole checkpoint that could stand for it"):
        VerifiedCheckpointIO().load_checkpoint(path)


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    first, second = VerifiedCheckpointIO(), VerifiedCheckpointIO()
    second.load_checkpoint(saved(tmp_path / "a.ckpt", 10, first))
    path = saved(tmp_path / "b.ckpt", 20, second)
    flip(path)
    with pytest.warns(UserWarning, match="a.ckpt"):
        assert VerifiedCheckpointIO().load_checkpoint(path)["global_step"] == 10


def test_weights_alone_do_not_stand_for_what_resumes(tmp_path: Path) -> None:
    io = VerifiedCheckpointIO()
    io.save_checkpoint({"global_step": 10, "epoch": 0, "state_dict": {}}, tmp_path / "weights.ckpt")
    path = saved(tmp_path / "a.ckpt", 20, io)
    flip(path)
    with pytest.raises(AdapterFileError, match="no whole checkpoint that could stand for it"):
        io.load_checkpoint(path)


def test_falling_back_can_be_forbidden(tmp_path: Path) -> None:
    io = VerifiedCheckpointIO(fall_back=False)
    early, late = (saved(tmp_path / f"{step}.ckpt", step, io) for step in (10, 20))
    flip(late)
    with pytest.raises(
        AdapterFileError, match=r"20.ckpt is damaged.*beside it is .*10.ckpt \(step 10\): name that one"
    ):
        io.load_checkpoint(late)
    assert io.load_checkpoint(early)["global_step"] == 10


def test_a_copied_folder_falls_back_within_itself(tmp_path: Path) -> None:
    fitted(tmp_path)
    moved = (tmp_path / "kept").rename(tmp_path / "moved")
    flip(moved / "last.ckpt")
    with pytest.warns(UserWarning, match=r"moved/last.ckpt is damaged.*moved/step=8.ckpt"):
        choose_checkpoint(moved / "last.ckpt")


def test_missing_file_is_missing_and_not_damaged(tmp_path: Path) -> None:
    saved(tmp_path / "a.ckpt", 4, VerifiedCheckpointIO())
    with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: .*b.ckpt"):
        VerifiedCheckpointIO().load_checkpoint(tmp_path / "b.ckpt")


def test_manifest_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    io = VerifiedCheckpointIO()
    saved(tmp_path / "a.ckpt", 4, io)
    path = saved(tmp_path / "b.ckpt", 8, io)
    manifest = json.loads(manifest_of(path).read_bytes()) | {"format": 2}
    manifest_of(path).write_text(json.dumps(manifest))
    with pytest.raises(AdapterFileError, match="has format 2, newer than 1: update lightning-lora"):
        io.load_checkpoint(path)


@pytest.mark.parametrize(("torch_version", "warns"), [("2.12.9", True), ("2.13.7+cu130", False), ("unknown", False)])
def test_another_minor_release_of_a_library_loads_with_a_warning(
    torch_version: str, warns: bool, tmp_path: Path
) -> None:
    io = VerifiedCheckpointIO()
    path = saved(tmp_path / "a.ckpt", 4, io)
    manifest = json.loads(manifest_of(path).read_bytes())
    present = ".".join(torch.__version__.split(".")[:2])
    manifest["libraries"]["torch"] = torch_version.replace("2.13", present)
    manifest_of(path).write_text(json.dumps(manifest))
    if warns:
        with pytest.warns(UserWarning, match=r"written with torch 2\.12\.9 \(now 2\..*need not go on exactly"):
            assert io.load_checkpoint(path)["global_step"] == 4
    else:
        assert io.load_checkpoint(path)["global_step"] == 4


@pytest.fixture
def remarks(caplog: pytest.LogCaptureFixture) -> Any:
    """What Lightning's rank-zero logger says."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield lambda: [record.getMessage() for record in caplog.records if "manifest" in record.getMessage()]
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def test_checkpoint_of_plain_lightning_loads_with_one_remark(remarks: Any, tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path)
    trainer.fit(Toy(), toys.loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    continued = fitted(tmp_path, ckpt_path=tmp_path / "plain.ckpt")
    assert continued.global_step == 8
    (remark,) = set(remarks())
    assert remark.startswith(f"{tmp_path / 'plain.ckpt'} has no manifest; its own checksums agree")


@pytest.mark.parametrize("old_format", [False, True])
def test_damaged_checkpoint_of_plain_lightning_is_refused_by_its_own_checksums(
    old_format: bool, tmp_path: Path
) -> None:
    path = tmp_path / "plain.ckpt"
    torch.save({"x": torch.ones(1000)}, path, _use_new_zipfile_serialization=not old_format)
    assert VerifiedCheckpointIO().load_checkpoint(path)["x"].sum() == 1000
    if old_format:
        path.write_bytes(b"\0" * 100)
        text = "it does not begin like a checkpoint"
    else:
        flip(path)
        torch.load(path, weights_only=True)  # torch sees nothing
        text = "the checksum of its part 'plain/data/0' is wrong"
    with pytest.raises(AdapterFileError, match=text):
        VerifiedCheckpointIO().load_checkpoint(path)
    cut(path)
    with pytest.raises(AdapterFileError, match="is damaged"):
        VerifiedCheckpointIO().load_checkpoint(path)


def test_rotation_removes_checkpoints_with_their_manifests(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", save_top_k=1)
    fitted(tmp_path, keep, epochs=3)
    assert names(tmp_path / "kept") == ["step=12.ckpt", f"step=12.ckpt{SUFFIX}"]


def test_linked_last_checkpoint_is_verified_by_the_file_it_names(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", save_last="link", save_top_k=-1)
    fitted(tmp_path, keep)
    last = tmp_path / "kept" / "last.ckpt"
    assert last.is_symlink()
    assert choose_checkpoint(last).path.name == "step=8.ckpt"
    flip(tmp_path / "kept" / "step=8.ckpt")
    with pytest.warns(UserWarning, match=r"last.ckpt is damaged.*step=4.ckpt"):
        assert choose_checkpoint(last).path.name == "step=4.ckpt"
    (tmp_path / "kept" / "step=8.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"last.ckpt is damaged: it is gone.*step=4.ckpt"):
        assert choose_checkpoint(last).path.name == "step=4.ckpt"


def test_saving_over_a_link_leaves_the_file_it_named(tmp_path: Path) -> None:
    io = VerifiedCheckpointIO()
    first = saved(tmp_path / "first.ckpt", 4, io)
    (tmp_path / "last.ckpt").symlink_to("first.ckpt")
    saved(tmp_path / "last.ckpt", 8, io)
    assert io.load_checkpoint(first)["global_step"] == 4
    assert io.load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 8
    assert not (tmp_path / "last.ckpt").is_symlink()


def test_removing_a_link_leaves_the_file_it_named(tmp_path: Path) -> None:
    io = VerifiedCheckpointIO()
    first = saved(tmp_path / "first.ckpt", 4, io)
    (tmp_path / "last.ckpt").symlink_to("first.ckpt")
    io.remove_checkpoint(tmp_path / "last.ckpt")
    assert io.load_checkpoint(first)["global_step"] == 4
    io.remove_checkpoint(first)
    assert names(tmp_path) == []


def test_it_works_in_a_thread_of_lightning(tmp_path: Path) -> None:
    fitted(tmp_path, io=AsyncCheckpointIO(VerifiedCheckpointIO()))
    for path in (tmp_path / "kept").glob("*.ckpt"):
        assert examine(path).version is not None
    fitted(tmp_path, io=AsyncCheckpointIO(VerifiedCheckpointIO()), ckpt_path=tmp_path / "kept" / "last.ckpt", epochs=3)


def test_storage_options_are_refused_as_lightning_refuses_them(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"storage_options.*not supported for `VerifiedCheckpointIO`"):
        VerifiedCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", storage_options={"x": 1})


def test_an_error_in_the_middle_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    io = VerifiedCheckpointIO()
    path = saved(tmp_path / "a.ckpt", 4, io)
    for target in (path, tmp_path / "new.ckpt"):
        with pytest.raises(Exception, match="pickle"):
            saved(target, 8, io, bad=lambda: 0)
    assert names(tmp_path) == ["a.ckpt", f"a.ckpt{SUFFIX}"]
    assert io.load_checkpoint(path)["global_step"] == 4


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


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return Path.write_text, (self.sentinel, "run")


def test_pickled_code_does_not_run_and_is_not_tried_a_second_time(tmp_path: Path) -> None:
    io = VerifiedCheckpointIO()
    early = saved(tmp_path / "a.ckpt", 4, io)
    late = saved(tmp_path / "b.ckpt", 8, io, bad=Payload(tmp_path / "sentinel"))
    with pytest.raises(Exception, match="Weights only load failed"):
        io.load_checkpoint(late)
    assert not (tmp_path / "sentinel").exists()
    assert io.load_checkpoint(early)["global_step"] == 4


SHARDED = """
import os, sys, torch
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_lora.callbacks import CheckpointGuard
from lightning_lora.sharding import shard_lora
from tests import toys

class Sharded(toys.Toy):
    def configure_model(self):
        if not hasattr(self, "sharded"):
            self.apply_lora()
            shard_lora(self.net, self.device_mesh)
            self.sharded = True

def run(epochs, ckpt_path=None):
    torch.manual_seed(0)
    module = Sharded()
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
    keep = ModelCheckpoint(Path(sys.argv[1]) / "kept", filename="{step}", save_top_k=-1)
    trainer = toys.trainer(
        Path(sys.argv[1]), max_epochs=epochs, strategy=strategy, callbacks=[keep, CheckpointGuard()],
        enable_checkpointing=True,
    )
    trainer.fit(module, toys.loader(), ckpt_path=ckpt_path, weights_only=True)
    return module

run(1)
path = Path(sys.argv[1]) / "kept" / "step=4.ckpt"
print(sorted(os.listdir(path.parent)))
whole, resumed = run(2), run(2, path)
print(all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in zip(whole.parameters(), resumed.parameters())))
content = bytearray(path.read_bytes())
content[path.read_bytes().index(torch.load(path)["state_dict"]["net.first.lora_B"].numpy().tobytes())] ^= 1
path.write_bytes(content)
try:
    run(2, path)
except ValueError as error:
    print(error)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_whole_checkpoints_of_fsdp2_are_verified_too(tmp_path: Path) -> None:
    done = toys.run_python(SHARDED, tmp_path)
    listing, same, error = done.stdout.splitlines()[-3:]
    assert listing == str(["step=4.ckpt", f"step=4.ckpt{SUFFIX}"])
    assert same == "True"
    assert "step=4.ckpt is damaged: its SHA-256" in error


def test_the_previous_manifest_is_kept_until_the_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    TorchCheckpointIO().save_checkpoint({"global_step": 1}, path)
    saved(path, 2, VerifiedCheckpointIO())
    (version,) = read_manifest(path)
    assert version.step == 2


def test_guard_refuses_to_test_other_weights_than_asked_for(tmp_path: Path) -> None:
    fitted(tmp_path)
    flip(tmp_path / "kept" / "last.ckpt")
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}")
    trainer = runner(tmp_path, CheckpointGuard(), keep, max_epochs=3)
    with pytest.raises(AdapterFileError, match=r"last.ckpt is damaged.*name that one, if you mean it"):
        trainer.test(Toy(), toys.loader(), ckpt_path=tmp_path / "kept" / "last.ckpt")
    with pytest.warns(UserWarning, match="instead, the last whole checkpoint"):
        trainer.fit(Toy(), toys.loader(), ckpt_path=tmp_path / "kept" / "last.ckpt")
