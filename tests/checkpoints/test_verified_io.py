"""Checkpoints get a manifest when they are written, and are verified against it before they are loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO
from lightning_lora.errors import AdapterFileError
from lightning_lora.files.atomic import sha256
from lightning_lora.files.checkpoint_manifest import SUFFIX, examine, manifest_of
from tests.support import toys
from tests.support.payload import Payload
from tests.support.toys import Toy
from tests.support.verified_files import fitted, names, runner, saved

pytestmark = toys.expected_warnings


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


def test_whole_checkpoint_loads_without_a_word(tmp_path: Path) -> None:
    fitted(tmp_path, epochs=1)
    fitted(tmp_path, ckpt_path=tmp_path / "kept" / "step=4.ckpt")  # a warning would be an error


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


@pytest.mark.parametrize(("torch_version", "warns"), [("1.13.9", True), ("PRESENT.7+cu130", False), ("unknown", False)])
def test_another_minor_release_of_a_library_loads_with_a_warning(
    torch_version: str, warns: bool, tmp_path: Path
) -> None:
    io = VerifiedCheckpointIO()
    path = saved(tmp_path / "a.ckpt", 4, io)
    manifest = json.loads(manifest_of(path).read_bytes())
    present = ".".join(torch.__version__.split(".")[:2])
    manifest["libraries"]["torch"] = torch_version.replace("PRESENT", present)
    manifest["libraries"]["lightning"] = "not installed"  # says nothing, and hides nothing
    manifest_of(path).write_text(json.dumps(manifest))
    if warns:
        with pytest.warns(UserWarning, match=r"written with torch 1\.13\.9 \(now 2\..*may not continue exactly"):
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


def test_rotation_removes_checkpoints_with_their_manifests(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", save_top_k=1)
    fitted(tmp_path, keep, epochs=3)
    assert names(tmp_path / "kept") == ["step=12.ckpt", f"step=12.ckpt{SUFFIX}"]


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


def test_pickled_code_does_not_run_and_is_not_tried_a_second_time(tmp_path: Path) -> None:
    io = VerifiedCheckpointIO()
    early = saved(tmp_path / "a.ckpt", 4, io)
    late = saved(tmp_path / "b.ckpt", 8, io, bad=Payload(tmp_path / "sentinel"))
    with pytest.raises(AdapterFileError, match=r"b\.ckpt is not .* safely: it names \S+, .*never unpickled"):
        io.load_checkpoint(late)
    assert not (tmp_path / "sentinel").exists()
    assert io.load_checkpoint(early)["global_step"] == 4
