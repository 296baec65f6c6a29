"""Every committed study file is read, and every option that it sets exists."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lora import LoRAConfig
from lightning_lora.allowed_imports import ALLOW_VARIABLE
from lightning_lora.cli.parser import restrict_imports
from lightning_lora.cli.study.fit_config import fit_config
from lightning_lora.study.matched.checks.equal import check_equal
from lightning_lora.study.matched.options import has_option, option_of, set_option
from lightning_lora.study.matched.spec import read_spec
from tests.support import toys

FILES = sorted(path.relative_to(toys.ROOT) for path in (toys.ROOT / "studies").rglob("*.yaml"))
STUDIES = [path for path in FILES if "arms" in (yaml.safe_load((toys.ROOT / path).read_text()) or {})]
OVERLAYS = [path for path in FILES if path not in STUDIES]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands of the files are given at the root of the repository, and name the modules beside them."""
    monkeypatch.chdir(toys.ROOT)
    monkeypatch.setenv(ALLOW_VARIABLE, "studies")
    restrict_imports()
    yield
    monkeypatch.undo()
    restrict_imports()


def test_there_are_study_files_for_two_cores_one_gpu_and_a_cluster() -> None:
    assert {path.parent.name for path in STUDIES} == {"studies", "gpu", "cluster"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_says_first_what_it_shows_and_the_command(path: Path) -> None:
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ")
    assert second.startswith("#   ")
    assert "lightning-lora" in second
    assert str(path) in second


@pytest.mark.parametrize("path", STUDIES, ids=str)
def test_all_options_of_a_study_exist_and_arms_differ_only_where_they_may(path: Path) -> None:
    spec, configs, overrides = read_spec(path)
    made = {arm.name: changed(parsed(configs + arm.configs), {**overrides, **arm.overrides}) for arm in spec.arms}
    for config in made.values():
        LoRAConfig.from_dict(option_of(config, "model.init_args.lora") or {})
    if not any(arm.matched_rank for arm in spec.arms):  # their ranks are found from the model
        check_equal(spec.with_configs(made).arms)


def test_every_overlay_is_used_by_a_study() -> None:
    used = {Path(name) for path in STUDIES for name in read_spec(path)[1]}
    assert used >= set(OVERLAYS)


@functools.cache
def parsed(configs: tuple[str, ...]) -> dict[str, Any]:
    """What ``fit`` reads from config files; one reading takes most of a second."""
    return fit_config([f"--config={name}" for name in configs], str(configs))


def changed(config: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A config with options, all of which it must have."""
    config = copy.deepcopy(config)
    for option, value in options.items():
        values = {f"{option}.{name}": each for name, each in value.items()} if option.endswith("init_args") else {}
        for name, each in (values or {option: value}).items():
            assert has_option(config, name), name
            set_option(config, name, each)
    return config
