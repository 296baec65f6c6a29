"""What is built and shipped."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KERNELS = "lora/functional/kernels/measured.json"


@pytest.mark.slow
def test_the_wheel_holds_the_package_with_callbacks_and_assets_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "callbacks/guard.py",
        "assets/tiny-base/model.safetensors",
        "assets/gsm8k/LICENSE",
        "py.typed",
        "assets/cli_configs/sft.yaml",
        "assets/cli_configs/strategy/ddp.yaml",
        KERNELS,
    ):
        assert f"lightning_lora/{needed}" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lightning_lora"}


@pytest.mark.slow
def test_the_source_archive_holds_all_that_its_tests_read(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    assert set(listed.stdout.splitlines()) - held == {"callbacks", ".gitignore"} - held
    assert "lightning_lora/callbacks/guard.py" in held


def test_the_embedded_data_is_the_start_of_the_real_data() -> None:
    shared = ROOT.parent / "shared" / "data" / "gsm8k"
    if not shared.is_dir():
        pytest.skip("../shared is not here")
    for name, source, rows in (("train.jsonl", "train.jsonl", 640), ("validation.jsonl", "test.jsonl", 64)):
        embedded = (ROOT / "lightning_lora/assets/gsm8k" / name).read_text()
        assert embedded == "".join((shared / source).read_text().splitlines(keepends=True)[:rows])


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
