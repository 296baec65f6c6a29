"""A checkpoint that unpacks to more than it is: every way to read one refuses it within bounds."""

from __future__ import annotations

import io
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.callbacks import CheckpointGuard
from lightning_lora.errors import AdapterFileError
from tests.support import toys
from tests.support.toys import Plain, Toy, trainer

pytestmark = toys.expected_warnings
ZEROS = 300 * 10**6
READ: dict[str, Callable[[Path, Path], Any]] = {
    "fit": lambda bomb, folder: trainer(folder).fit(Toy(), toys.loader(), ckpt_path=bomb, weights_only=True),
    "validate": lambda bomb, folder: trainer(folder).validate(Toy(), toys.loader(), ckpt_path=bomb),
    "guard of a plain module": lambda bomb, folder: trainer(folder, callbacks=[CheckpointGuard()]).fit(
        Plain(), toys.loader(), ckpt_path=bomb
    ),
    "load_from_checkpoint": lambda bomb, _: Toy.load_from_checkpoint(bomb),
    "load_from_checkpoint of text": lambda bomb, _: Toy.load_from_checkpoint(str(bomb), map_location="cpu"),
    "load_from_checkpoint of an open file": lambda bomb, _: Toy.load_from_checkpoint(io.BytesIO(bomb.read_bytes())),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    toys.fit(Toy(), folder).save_checkpoint(folder / "whole.ckpt")
    return folder / "whole.ckpt"


@pytest.fixture(scope="module")
def bomb(whole: Path) -> Path:
    bomb = whole.with_name("bomb.ckpt")
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(bomb, "w") as target:
        for part in source.infolist():
            if part.filename.endswith("data/0"):
                target.writestr(part.filename, bytes(ZEROS), zipfile.ZIP_DEFLATED, 1)
            else:
                target.writestr(part.filename, source.read(part))
    assert bomb.stat().st_size < 2 * 10**6
    return bomb


@pytest.mark.parametrize("way", READ)
def test_a_packed_checkpoint_is_refused_by_every_reader(way: str, bomb: Path, tmp_path: Path) -> None:
    """B55."""
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(AdapterFileError, match="is compressed, 300,000,000 bytes in"):
            READ[way](bomb, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 100 * 10**6
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 3


def test_a_whole_checkpoint_is_loaded_from_a_path_and_from_an_open_file(whole: Path) -> None:
    one = Toy.load_from_checkpoint(whole)
    with whole.open("rb") as file:
        assert toys.same(toys.snapshot(one), toys.snapshot(Toy.load_from_checkpoint(file)))
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        one.load_from_checkpoint(whole)
