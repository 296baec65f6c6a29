"""A file or folder on disk is the old one or the new one, whatever happens in between."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_lora.errors import AdapterFileError
from lightning_lora.files import atomic
from lightning_lora.files.adapter.peft_format import CONFIG_FILE
from lightning_lora.files.atomic import atomic_file, atomic_folder, sha256
from tests.support import toys
from tests.support.adapter_files import read_texts, write_folder


def exchange_refused(first: Path, second: Path) -> bool:
    return False


def test_file_holds_what_was_written_and_nothing_is_left(tmp_path: Path) -> None:
    for text in (b"old", b"new"):
        with atomic_file(tmp_path / "deep" / "a.bin") as file:
            file.write(text)
        assert (tmp_path / "deep" / "a.bin").read_bytes() == text
    assert os.listdir(tmp_path / "deep") == ["a.bin"]


def test_file_is_untouched_by_an_error_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_file_has_the_permissions_of_a_plain_open(tmp_path: Path) -> None:
    old_umask = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "a"):
            pass
        write_folder(tmp_path / "b", "x")
    finally:
        os.umask(old_umask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o750


def test_a_private_file_or_folder_stays_private_when_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").touch(0o600)
    (tmp_path / "b").mkdir(0o700)
    with atomic_file(tmp_path / "a"):
        pass
    write_folder(tmp_path / "b", "x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o700


def test_a_symbolic_link_keeps_pointing_where_it_did(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_folder(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / CONFIG_FILE).read_text() == "new"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The system calls that matter, in order; paths by their last part without the temporary decoration."""
    recorded: list[str] = []

    def note(name: str, real: Callable[..., object], path_of: Callable[..., str]) -> Callable[..., object]:
        def call(*args: object) -> object:
            path = re.sub(r"[.](.+)[.][0-9]+[.][0-9a-f]{24}[.]tmp", r"tmp-of-\1", path_of(*args))
            recorded.append(f"{name} {path}")
            return real(*args)

        return call

    def path_of_descriptor(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", note("fsync", os.fsync, path_of_descriptor))
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, note(name, getattr(os, name), lambda old, new: Path(new).name))
    monkeypatch.setattr(atomic, "_exchange", note("exchange", atomic._exchange, lambda new, old: Path(old).name))
    return recorded


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_disk_is_told_in_the_right_order(tmp_path: Path, calls: list[str]) -> None:
    home = tmp_path.name
    with atomic_file(tmp_path / "a"):
        pass
    assert calls == ["fsync tmp-of-a", "replace a", f"fsync {home}"]
    inside = [f"fsync {name}" for name in ("weights", "sub", CONFIG_FILE, "tmp-of-b")]
    for step in ("rename", "exchange"):
        calls.clear()
        write_folder(tmp_path / "b", "x")
        assert calls == [*inside, f"{step} b", f"fsync {home}"]


def test_new_parent_folders_reach_the_disk(tmp_path: Path, calls: list[str]) -> None:
    with atomic_file(tmp_path / "b" / "c" / "a"):
        pass
    assert calls[:2] == ["fsync b", f"fsync {tmp_path.name}"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_folder_is_replaced_as_a_whole(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", exchange_refused)
    write_folder(tmp_path / "a", "old")
    (tmp_path / "a" / "extra").write_text("old")
    write_folder(tmp_path / "a", "new")
    assert read_texts(tmp_path / "a") == {CONFIG_FILE: "new", "sub/weights": "new"}
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_folders_are_exchanged_in_one_call_on_this_machine(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").touch()
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "x").exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        atomic._exchange(tmp_path / "nowhere", tmp_path / "b")


def test_folder_is_untouched_by_an_error_in_the_middle(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "old")

    def write_half() -> None:
        with atomic_folder(tmp_path / "a", replaces=CONFIG_FILE) as folder:
            (folder / CONFIG_FILE).write_text("half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_half()
    assert read_texts(tmp_path / "a") == {CONFIG_FILE: "old", "sub/weights": "old"}
    assert os.listdir(tmp_path) == ["a"]


def test_folder_comes_back_if_the_second_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "a", "old")
    monkeypatch.setattr(atomic, "_exchange", exchange_refused)
    real_rename = os.rename

    def rename(old: Path, new: Path) -> None:
        if Path(old).suffix == ".tmp":
            raise OSError(errno.EIO, "injected")
        real_rename(old, new)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="injected"):
        write_folder(tmp_path / "a", "new")
    assert read_texts(tmp_path / "a") == {CONFIG_FILE: "old", "sub/weights": "old"}
    assert os.listdir(tmp_path) == ["a"]


def test_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "a", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "a", "new")
    with pytest.raises(OSError, match="No space left"), atomic_file(tmp_path / "a" / CONFIG_FILE) as file:
        file.write(b"new")
    assert read_texts(tmp_path / "a") == {CONFIG_FILE: "old", "sub/weights": "old"}
    assert os.listdir(tmp_path) == ["a"]


def test_folders_that_are_not_ours_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    thesis = rf"thesis is not empty and holds no {CONFIG_FILE}.*choose a new path"
    for name, message in (("thesis", thesis), ("file", "is a file")):
        with pytest.raises(AdapterFileError, match=message), atomic_folder(tmp_path / name, replaces=CONFIG_FILE):
            pytest.fail("the block must not run")
    assert read_texts(tmp_path) == {"thesis/chapter1.tex": "years of work", "file": "x"}


def test_a_foreign_folder_made_meanwhile_is_refused_too(tmp_path: Path) -> None:
    def write_while_another_makes_the_folder() -> None:
        with atomic_folder(tmp_path / "a", replaces=CONFIG_FILE):
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "foreign").touch()

    with pytest.raises(AdapterFileError, match="not ours"):
        write_while_another_makes_the_folder()
    assert os.listdir(tmp_path / "a") == ["foreign"]


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_folder(tmp_path / "a", "new")
    assert (tmp_path / "a" / CONFIG_FILE).read_text() == "new"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX users")
def test_a_folder_without_write_permission_raises_and_stays_as_it_was() -> None:
    script = """
        import os, sys
        from lightning_lora.files.atomic import atomic_file, atomic_folder
        if os.geteuid() == 0:
            os.seteuid(65534)
        folder = sys.argv[1]
        for written in (atomic_file(folder + "/file"), atomic_folder(folder, replaces="adapter_config.json")):
            try:
                with written:
                    sys.exit("the block ran")
            except PermissionError as error:
                assert os.path.dirname(error.filename) in (folder, os.path.dirname(folder)), error
    """
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to other users
        home = Path(os.path.realpath(name))
        write_folder(home / "a", "old")
        (home / "a").chmod(0o555)
        home.chmod(0o555)
        done = toys.run_python(textwrap.dedent(script), home / "a", check=False)
        (home / "a").chmod(0o755)
        home.chmod(0o755)
        assert done.returncode == 0, done.stderr
        assert read_texts(home) == {f"a/{CONFIG_FILE}": "old", "a/sub/weights": "old"}


def test_sha256_is_that_of_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "b").write_bytes(b"a" * 1_000_000)
    (tmp_path / "c").write_bytes(b"a" * (1 << 21))
    assert sha256(tmp_path / "b") == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    assert sha256(tmp_path / "c") != sha256(tmp_path / "b")


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "folder"])
def test_what_is_no_file_is_never_replaced_by_one(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "there"
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
        path = path if kind == "link to a pipe" else tmp_path / "pipe"
    before = {entry.name: entry.lstat().st_mode for entry in tmp_path.iterdir()}
    with pytest.raises(AdapterFileError, match="name a file"), atomic_file(path) as file:
        file.write(b"new")
    assert {entry.name: entry.lstat().st_mode for entry in tmp_path.iterdir()} == before
