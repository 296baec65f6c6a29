"""One run of lm-eval, in a process of its own: it seeds global generators, and imports what we do not want here."""

from __future__ import annotations

import getpass
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_lora.errors import BenchmarkError, ResultFileError
from lightning_lora.files.atomic import write_text
from lightning_lora.study.tasks.settings import TaskSettings

CONFIG, LOG = "lm_eval.yaml", "log.txt"
CODE, TRUST = "HF_ALLOW_CODE_EVAL", "HF_DATASETS_TRUST_REMOTE_CODE"
_LAST_LINES = 3
_SIGNS = ("marked as unsafe", "code_eval")
"""In a log of lm-eval that refused to run programs: it refuses late, and by what is missing first."""


def check_installed() -> None:
    """Refuse to begin without lm-eval; nothing of it is imported here.

    Raises:
        ConfigError: If it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise BenchmarkError('the package lm-eval is not installed: pip install "lightning-lora[eval]".')


def where_code_runs(folder: Path) -> str:
    """What somebody has to know who lets programs of a model run."""
    return (
        f"code execution is allowed: programs that the models write run on this machine as {getpass.getuser()}, "
        f"without a sandbox, in child processes of lm-eval (logs in {folder}); they can do what this user can"
    )


def config_of(settings: TaskSettings, model: str | Path, out: Path) -> dict[str, Any]:
    """The config file of lm-eval."""
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config: dict[str, Any] = {
        "model": "hf",
        "model_args": {"pretrained": str(model), "dtype": "auto"},
        "tasks": list(settings.tasks),
        "batch_size": settings.batch_size,
        "device": device,
        "output_path": str(out.absolute()),
        "log_samples": True,
        "apply_chat_template": settings.chat_template,
    }
    for name, value in (("limit", settings.limit), ("num_fewshot", settings.num_fewshot)):
        config |= {} if value is None else {name: value}
    if settings.task_folder is not None:
        config["include_path"] = str(Path(settings.task_folder).absolute())
    if settings.allow_code_execution:
        config["confirm_run_unsafe_code"] = True
    return config


def environment_of(settings: TaskSettings, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of lm-eval: code execution is on or off as asked here, whatever was set before."""
    kept = {name: value for name, value in given.items() if name not in (CODE, TRUST)}
    return kept | {"TOKENIZERS_PARALLELISM": "false", **({CODE: "1"} if settings.allow_code_execution else {})}


def run_lm_eval(settings: TaskSettings, model: str | Path, folder: Path) -> None:
    """Evaluate one model.

    Args:
        model: A model folder with its tokenizer, or a hub name.
        folder: Where config, log, results and samples are written.

    Raises:
        ConfigError: If a task runs programs that the model writes, and that is not allowed.
        DataError: If lm-eval fails; its last lines are in the message, all of them in ``log.txt``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, yaml.safe_dump(config_of(settings, model, folder), sort_keys=False))
    command = [sys.executable, "-m", "lm_eval", "run", "--config", str((folder / CONFIG).absolute())]
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment_of(settings, os.environ),
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip()
        if not settings.allow_code_execution and any(sign in text.lower() for sign in _SIGNS):
            raise BenchmarkError(
                f"of the tasks {', '.join(settings.tasks)} some run programs that the model writes, as this user and "
                f"without a sandbox: --allow-code-execution allows it, in a container or on a machine that may be lost."
            )
        lines = text.splitlines()
        raise ResultFileError(f"lm-eval ended with code {code}, see {folder / LOG}: {' / '.join(lines[-_LAST_LINES:])}")
