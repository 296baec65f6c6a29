"""A damaged checkpoint is noticed by its manifest, or by its own checksums, and never loaded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO
from lightning_lora.errors import AdapterFileError
from lightning_lora.files.checkpoint_manifest import CheckpointVersion, examine, manifest_of, write_manifest
from tests.support import toys
from tests.support.verified_files import cut, flip, saved

pytestmark = toys.expected_warnings

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
