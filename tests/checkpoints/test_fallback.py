"""Instead of a damaged checkpoint the last whole one of the same run is loaded, with a warning that names both."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora.callbacks import CheckpointGuard
from lightning_lora.checkpoints.fallback import choose_checkpoint
from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO
from lightning_lora.errors import AdapterFileError
from tests.support import toys
from tests.support.toys import Toy
from tests.support.verified_files import cut, fitted, flip, runner, saved

pytestmark = toys.expected_warnings


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


def test_guard_refuses_to_test_other_weights_than_asked_for(tmp_path: Path) -> None:
    fitted(tmp_path)
    flip(tmp_path / "kept" / "last.ckpt")
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}")
    trainer = runner(tmp_path, CheckpointGuard(), keep, max_epochs=3)
    with pytest.raises(AdapterFileError, match=r"last.ckpt is damaged.*name that one, if you mean it"):
        trainer.test(Toy(), toys.loader(), ckpt_path=tmp_path / "kept" / "last.ckpt")
    with pytest.warns(UserWarning, match="instead, the last whole checkpoint"):
        trainer.fit(Toy(), toys.loader(), ckpt_path=tmp_path / "kept" / "last.ckpt")
