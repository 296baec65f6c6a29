"""Folders of shards, read without unpickling what they may hold, and made into one file."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as torch_checkpoint

from lightning_lora.checkpoints.consolidate import consolidate
from lightning_lora.checkpoints.shards import read_shards
from lightning_lora.cli.main import main
from lightning_lora.errors import AdapterFileError
from lightning_lora.files.checkpoint_manifest import examine
from tests.support import toys
from tests.support.payload import Payload

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """What a sharded strategy leaves, with one shard; the small values of an optimizer are objects of their own."""
    folder = tmp_path / "shards"
    optimizer = {"state": {"a": {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": ["a"], "lr": 0.1}]}
    torch_checkpoint.save(
        {"state_dict": {"a": torch.arange(3.0), "base": torch.zeros(2)}, "optimizer_0": optimizer},
        checkpoint_id=folder,
        no_dist=True,
    )
    torch.save({"global_step": 7, "lightning_lora": {"frozen": ["base"]}}, folder / "meta.pt")
    return folder


def test_a_file_holds_what_the_shards_held_but_the_base(shards: Path, tmp_path: Path) -> None:
    assert consolidate(shards, tmp_path / "whole.ckpt") == tmp_path / "whole.ckpt"
    assert examine(tmp_path / "whole.ckpt").damage is None
    content = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert toys.same(content["state_dict"], {"a": torch.arange(3.0)})
    (state,) = content["optimizer_states"]
    assert torch.equal(state["state"]["a"]["exp_avg"], torch.ones(3))
    assert state["param_groups"] == [{"params": ["a"], "lr": 0.1}]
    assert content["global_step"] == 7


def test_the_command_writes_the_file_and_answers_bad_input_with_2(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole.ckpt"
    assert main(["consolidate", str(shards), str(whole)]) == 0
    assert capsys.readouterr().out == f"written: {whole}\n"
    assert torch.load(whole, weights_only=True)["global_step"] == 7
    assert main(["consolidate", str(shards), str(whole)]) == 2
    assert "whole.ckpt already exists: remove it" in capsys.readouterr().err
    assert main(["consolidate", str(tmp_path), str(tmp_path / "other.ckpt")]) == 2
    assert "is not a folder of shards" in capsys.readouterr().err


def test_a_file_that_exists_and_a_folder_without_shards_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="is not a folder of shards: give the folder that"):
        consolidate(tmp_path, tmp_path / "other.ckpt")
    (tmp_path / "whole.ckpt").touch()
    with pytest.raises(AdapterFileError, match=r"whole.ckpt already exists: remove it"):
        consolidate(shards, tmp_path / "whole.ckpt")
    assert (tmp_path / "whole.ckpt").read_bytes() == b""
    assert not (tmp_path / "other.ckpt").exists()


@pytest.mark.parametrize("place", ["index", "value", "meta"])
def test_nothing_that_a_folder_holds_is_run(place: str, shards: Path, tmp_path: Path) -> None:
    payload = Payload(tmp_path / "was-run")
    if place == "index":
        (shards / ".metadata").write_bytes(pickle.dumps(payload))
    elif place == "meta":
        torch.save({"payload": payload}, shards / "meta.pt")
    else:
        (shards / ".metadata").unlink()
        torch_checkpoint.save({"state_dict": {}, "payload": payload}, checkpoint_id=shards, no_dist=True)
    with pytest.raises(AdapterFileError, match=r"shards cannot be read as a folder of shards"):
        read_shards(shards)
    assert not (tmp_path / "was-run").exists()
