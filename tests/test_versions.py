"""Versions of libraries: what is installed, and what is refused because it is not supported."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lightning_lora.errors import VersionError
from lightning_lora.versions import check_versions, installed_version, requirements
from tests.support import warm


def test_a_package_that_is_not_installed_has_no_version_and_raises_nothing() -> None:
    """A run from a checkout must not fail at its first checkpoint."""
    assert installed_version("torch") == version("torch")
    assert installed_version("lightning-lora-of-nobody") == "not installed"


@pytest.mark.parametrize(
    ("present", "supported"),
    [
        ("2.9.1", False),
        ("2.10.0", True),
        ("2.10.0a0+b4e4ee81d3.nv25.12", True),  # as NVIDIA builds it
        ("2.11.0.dev20260301+cpu", True),
        ("2.99", False),
        ("3.0.0rc1", False),
        ("not installed", True),
        ("unknown", True),
    ],
)
def test_a_version_outside_the_bounds_is_refused(present: str, supported: bool) -> None:
    needed = [Requirement("torch>=2.10,!=2.99,<3"), Requirement('psycopg>=3.2.2; extra == "study"')]
    if supported:
        check_versions(needed, lambda name: present)
    else:
        with pytest.raises(VersionError, match=rf"the installed torch {re.escape(present)}: pip install \"torch.*>=2"):
            check_versions(needed, lambda name: present)


def test_all_that_is_wrong_is_said_at_once() -> None:
    needed = [Requirement("torch>=2.10"), Requirement("rich>=13"), Requirement("transformers>=5.6")]
    present = {"torch": "2.9.1", "rich": "15.0", "transformers": "4.57.1"}
    with pytest.raises(VersionError) as caught:
        check_versions(needed, present.__getitem__)
    assert caught.value.message == (
        "lightning-lora does not support the installed torch 2.9.1, transformers 4.57.1: "
        'pip install "torch>=2.10" "transformers>=5.6"'
    )


def test_the_bounds_are_those_of_the_installed_package() -> None:
    assert {"torch", "lightning", "transformers", "jsonargparse"} <= {one.name for one in requirements()}
    assert all(installed_version(one.name) != "not installed" for one in requirements() if one.marker is None)


MESSAGE = 'lightning-lora does not support the installed rich 12.6.0: pip install "rich>=13" [LL910 '


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where Python looks first: it reads there that this package needs rich 13, and that rich 12 is installed."""
    for name, number, needs in (("lightning-lora", "0.1.0", "Requires-Dist: rich>=13\n"), ("rich", "12.6.0", "")):
        folder = tmp_path / f"{name.replace('-', '_')}-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n{needs}")
    return os.pathsep.join([str(tmp_path), str(warm.ROOT)])


@pytest.mark.slow
@pytest.mark.parametrize("code", ["from lightning_lora import LoRAConfig", "import lightning_lora.callbacks"])
def test_an_import_ends_with_the_message(code: str, path: str) -> None:
    done = warm.run_cold("-W", "ignore", "-c", code, code=1, PYTHONPATH=path)
    assert MESSAGE in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_command_prints_the_message_alone(path: str) -> None:
    done = warm.run_cold("-m", "lightning_lora", "merge", "nowhere", "nowhere", "out", code=2, PYTHONPATH=path)
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {MESSAGE}")
    assert done.stderr.count("\n") == 1
