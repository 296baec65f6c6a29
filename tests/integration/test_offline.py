"""Without a network what is on this machine works at once, and what is not is told in seconds."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lightning_lora import hub
from tests.support import toys, warm

SCRIPT = """
import contextlib, io, json, os, socket, sys, time, warnings

def dead(*arguments, **options):
    raise socket.gaierror(-3, "Temporary failure in name resolution")

socket.getaddrinfo = dead
from lightning_lora.cli import main as cli

settings, runs, waits, sleep = json.loads(sys.argv[1]), {}, [], time.sleep
time.sleep = lambda seconds: (waits.append(seconds), sleep(seconds))
for name, arguments in settings.items():
    printed = io.StringIO()
    waits.clear()
    with contextlib.redirect_stderr(printed):
        code = cli.main(arguments)
    runs[name] = {"code": code, "waited": sum(waits), "error": printed.getvalue()}
print(json.dumps(runs))
"""
FIRST = "https://huggingface.co cannot be reached: from now on only files on this machine are used"


def cached(home: Path, name: str, files: Path) -> None:
    """Put ``files`` where the hub's client keeps what it has downloaded."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(files, folder / "snapshots" / ("0" * 40))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What three runs without name resolution answer, one after the other in one process."""
    folder = tmp_path_factory.mktemp("offline")
    cached(folder / "home", "some/llama", toys.save_llama(folder / "llama"))
    (folder / "rows.jsonl").write_text('{"question": "what", "answer": "so"}\n' * 4)
    rest = [
        "fit",
        f"--config={toys.ROOT / 'cli_configs' / 'sft.yaml'}",
        "--data.init_args.validation=null",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=1",
        f"--trainer.logger.init_args.save_dir={folder}",
    ]
    settings = {
        "model": ["--model.init_args.model=nobody/nothing", f"--data.init_args.train={folder / 'rows.jsonl'}"],
        "data": ["--model.init_args.model=some/llama", "--data.init_args.train=nobody/nothing"],
        "cached": ["--model.init_args.model=some/llama", f"--data.init_args.train={folder / 'rows.jsonl'}"],
    }
    commands = json.dumps({name: [*rest, *more] for name, more in settings.items()})
    done = warm.run_cold("-c", SCRIPT, commands, HF_HOME=str(folder / "home"), HF_HUB_OFFLINE="")
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "data"])
def test_what_is_not_here_is_told_without_waiting_with_the_setting_to_change(name: str, runs: dict[str, Any]) -> None:
    run = runs[name]
    assert run["code"] == 2
    (message,) = [line for line in run["error"].splitlines() if line.startswith("error: ")]
    assert "'nobody/nothing'" in message
    assert "It is not on this machine, and the hub is not asked (HF_HUB_OFFLINE=1" in message
    assert "Retrying" not in run["error"]
    assert run["waited"] < 1


@pytest.mark.slow
def test_what_is_here_works_and_the_network_is_missed_once(runs: dict[str, Any]) -> None:
    assert runs["cached"]["code"] == 0
    assert [name for name in runs if FIRST in runs[name]["error"]] == ["model"]


def test_a_resolver_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = threading.Event(), threading.Event()

    def silent(*arguments: Any, **options: Any) -> None:
        asked.set()
        answered.wait(60)
        raise socket.gaierror("no answer")

    monkeypatch.setattr(hub, "TIMEOUT", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", silent)
    assert not hub._is_reachable("https://resolver.invalid")
    assert asked.is_set()
    assert not answered.is_set()
    answered.set()


def test_a_host_that_answers_is_reached_and_a_proxy_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.delenv("http_proxy", raising=False)
        monkeypatch.delenv("HTTP_PROXY", raising=False)
        assert hub._is_reachable(address)
    # Nobody listens there any more, but the proxy may know better.
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    assert hub._is_reachable(address.replace("http:", "https:"))


def test_who_wants_the_hub_to_be_asked_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: pytest.fail("a name was looked up"))
    hub.prepare_hub("some/model")
    assert not constants.is_offline_mode()


def test_nothing_is_looked_up_when_offline_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: pytest.fail("a name was looked up"))
    hub.prepare_hub("some/model")
    assert "HF_HUB_OFFLINE=1" in hub.offline_hint("some/model")


def test_a_folder_is_no_matter_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: pytest.fail("a name was looked up"))
    hub.prepare_hub(str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.offline_hint(str(tmp_path)) == ""
