"""Workflows, templates and the citation say what is so, and ask for no more rights than they need."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.warm import ROOT

WORKFLOWS = {path.stem: path for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
PROJECT = (ROOT / "pyproject.toml").read_text()
DEPENDENCIES = re.sub(r"#.*", "", PROJECT[PROJECT.index("dependencies = [") : PROJECT.index("[project.scripts]")])


def workflow(name: str) -> dict[Any, Any]:
    return yaml.safe_load(WORKFLOWS[name].read_text())


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


def made(name: str) -> set[str]:
    """Targets of the Makefile that a workflow makes."""
    return {word for step in steps(name) for word in re.findall(r"make (\S+)", step.get("run", ""))}


def test_the_workflows_are_these() -> None:
    assert set(WORKFLOWS) == {"lint", "test", "docs", "publish"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_makes_what_the_makefile_knows(name: str) -> None:
    versions = [include["versions"] for include in workflow("test")["jobs"]["pins"]["strategy"]["matrix"]["include"]]
    asked = made(name) - {"${{"} | (set(versions) if "${{" in made(name) else set())
    assert asked
    assert asked <= TARGETS


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_make_and_nothing_beside(name: str) -> None:
    """What fails there can be run here; the tag of a release is compared before anything is built."""
    run = [step["run"] for step in steps(name) if "run" in step]
    others = [command for command in run if not re.match(r"make \S+( TORCH=\"\$TORCH\")?$|make \$\{\{ matrix", command)]
    assert others == (['grep -Fx "version = \\"${TAG#v}\\"" pyproject.toml'] if name == "publish" else [])
    if others:
        (version,) = re.findall(r'^version = "(.+)"$', PROJECT, flags=re.MULTILINE)
        for tag, code in ((f"v{version}", 0), ("v9.9.9", 1)):
            shell = ["bash", "-c", others[0]]
            assert (
                subprocess.run(
                    shell, cwd=ROOT, env=os.environ | {"TAG": tag}, stdout=subprocess.DEVNULL, check=False
                ).returncode
                == code
            )


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_action_is_pinned_to_one_commit_and_says_its_version(name: str) -> None:
    """A tag may be moved to other code; one commit cannot be other code in another workflow."""
    used = re.findall(r"uses: (.*)", WORKFLOWS[name].read_text())
    assert len(used) == sum("uses" in step for step in steps(name)) > 0
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action)
    everywhere = {action for path in WORKFLOWS.values() for action in re.findall(r"uses: (.*)", path.read_text())}
    assert len(everywhere) == len({action.partition("@")[0] for action in everywhere})


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_read_only_and_has_no_secret(name: str) -> None:
    assert workflow(name)["permissions"] == {"contents": "read"}
    assert "secrets." not in WORKFLOWS[name].read_text()
    for job, settings in workflow(name)["jobs"].items():
        may = settings.get("permissions", {})
        assert may == ({"id-token": "write"} if (name, job) == ("publish", "upload") else {})
        assert settings["timeout-minutes"]
    kept = [step["with"]["persist-credentials"] for step in steps(name) if "checkout" in step.get("uses", "")]
    assert kept
    assert not any(kept)


def test_the_job_that_uploads_runs_nothing_of_ours() -> None:
    upload = workflow("publish")["jobs"]["upload"]
    assert upload["environment"] == "pypi"
    assert [step.get("run") for step in upload["steps"]] == [None, None]
    assert workflow("publish")[True] == {"release": {"types": ["published"]}}  # YAML reads `on` as a truth value


def test_every_python_is_tested_that_the_project_names() -> None:
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    jobs = workflow("test")["jobs"]
    assert jobs["fast"]["strategy"]["matrix"]["python"] == named
    pins = {one["versions"]: one["python"] for one in jobs["pins"]["strategy"]["matrix"]["include"]}
    assert pins == {"lowest": named[0], "highest": named[-1]}
    assert f'requires-python = ">={named[0]}"' in PROJECT
    makefile = (ROOT / "Makefile").read_text()
    assert all(f".ci/versions {kind} {python}" in makefile for kind, python in pins.items())


def test_torch_is_that_of_the_makefile() -> None:
    (version,) = re.findall(r"^TORCH \?= torch==(\S+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {workflow(name)["env"]["TORCH"] for name in WORKFLOWS} == {f"torch=={version}+cpu"}


def test_every_dependency_has_a_lower_bound() -> None:
    """Without one, `make lowest` would test the first version that ever was."""
    named = re.findall(r'"([a-z][\w.-]*(?:\[\w+\])?)([^"]*)"', DEPENDENCIES)
    unbound = [name for name, bound in named if not re.match(r">=|==", bound)]
    assert unbound == ["lightning-lora[docs]"]
    assert len(named) > 30


def test_pages_and_pins_name_the_same_versions() -> None:
    first, *_, last = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    for name in ("README.md", "docs/start/install.md"):
        assert f"Python {first} or newer" in (ROOT / name).read_text().replace("\n", " "), name
    page = (ROOT / "docs/reference/compatibility.md").read_text()
    assert f"Python {first} to {last}." in page
    pins = {one.name: one.specifier for one in map(Requirement, re.findall(r'"([a-z][^"]+)"', DEPENDENCIES))}
    table = {}
    for libraries, lowest, highest in re.findall(r"^\| ([\w, -]+) \| ([\d., ]+) \| ([\d., ]+) \|$", page, flags=re.M):
        tried = zip(*(cell.split(", ") for cell in (libraries, lowest, highest)), strict=True)
        table |= {library.lower(): versions for library, *versions in tried}
    assert table.pop("python")[0].startswith(f"{first}.")
    assert {"torch", "lightning", "transformers", "jsonargparse", "peft"} <= table.keys() <= pins.keys()
    for library, (lowest, highest) in table.items():
        (bound,) = (one.version for one in pins[library] if one.operator == ">=")
        assert Version(lowest) == Version(bound), library
        assert pins[library].contains(highest), library


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (version,) = re.findall(r'^version = "(.+)"', PROJECT, flags=re.MULTILINE)
    assert citation["version"] == version
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the schema requires


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_a_template_asks_for_something_and_requires_it(name: str) -> None:
    template = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert {"name", "description", "body"} <= template.keys()
    ids = [part["id"] for part in template["body"]]
    assert len(set(ids)) == len(ids)
    assert any(part.get("validations", {}).get("required") for part in template["body"])


def test_templates_and_policies_name_commands_and_files_that_exist() -> None:
    from lightning_lora.cli.commands import COMMANDS

    pages = [*(ROOT / ".github").rglob("*.md"), *(ROOT / ".github").rglob("*.yml"), ROOT / "SECURITY.md"]
    pages += (ROOT / "docs").rglob("compatibility.md")
    assert len(pages) > 8
    for page in pages:
        text = page.read_text()
        assert set(re.findall(r"`lightning-lora (\w+)", text)) <= set(COMMANDS) | {"fit"}, page
        assert set(re.findall(r"`make (\w+)`", text)) <= TARGETS, page
        files = re.findall(r"`((?:\.\w+|docs|tests|build)/[\w./-]+\.\w+|[A-Z]+\.md)`", text)
        assert [file for file in files if not Path(ROOT, file).is_file()] == [], page
