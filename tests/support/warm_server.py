"""A Python that has imported everything and run nothing, and forks itself for each command line: see `warm`.

``python warm_server.py FD`` answers questions that come over the connection with this file descriptor.

- ``("start", request)``: fork; the answer is the process id. The child goes on as ``python *request["arguments"]``.
- ``("poll", pid)``: the answer is the exit code as `subprocess` gives it, or ``None`` while the child runs.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import multiprocessing.util
import os
import pkgutil
import random
import runpy
import signal
import sys
import tempfile
import threading
import types
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

# Imported by runs of the embedded model, and by no module of ours before it is asked to do something.
OTHERS = (
    "bitsandbytes",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "numpy",
    "peft",
    "pytest",
    "torch.distributed.run",
    "torchao.quantization",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)


def preload() -> None:
    """Import all modules of the package, and what they import when they are asked to do something."""
    package = importlib.import_module("lightning_lora")
    for module in pkgutil.walk_packages(package.__path__, "lightning_lora."):
        # Kernels import Triton, which need not be installed, and nothing uses them here.
        if not module.name.endswith("__main__") and ".kernels." not in module.name:
            importlib.import_module(module.name)
    for name in OTHERS:
        with suppress(ImportError):
            importlib.import_module(name)
    threads = {
        path.read_text().strip()
        for path in Path("/proc/self/task").glob("*/comm")
        if path.parent.name != f"{os.getpid()}"
    }
    # The allocator of pyarrow can be forked; other threads would hold locks that nobody opens in the child.
    assert threading.active_count() == 1, threading.enumerate()
    assert threads <= {"jemalloc_bg_thd"}, threads


def serve(connection: Connection) -> dict[str, Any]:
    """Answer until the connection is closed, then kill the children. Returns in each child, with its request."""
    running: set[int] = set()
    while True:
        try:
            kind, *question = connection.recv()
        except EOFError:
            for pid in running:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            os._exit(0)
        if kind == "start":
            (request,) = question
            if (pid := os.fork()) == 0:
                connection.close()
                os.setpgid(0, 0)
                return request
            with suppress(PermissionError, ProcessLookupError):  # the child was faster
                os.setpgid(pid, pid)
            running.add(pid)
            connection.send(pid)
        else:
            (pid,) = question
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                running.discard(pid)
            connection.send(os.waitstatus_to_exitcode(status) if found else None)


def become(request: dict[str, Any]) -> None:
    """Be like an interpreter that has just been started in this folder and environment, with these streams."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        opened = os.open(request[name], flags | os.O_NOCTTY, 0o666)
        os.dup2(opened, number)
        os.close(opened)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream.isatty() or stream is sys.stderr)  # pyright: ignore
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = None
    import numpy
    import torch

    for seed in (random.seed, numpy.random.seed, torch.seed):
        seed()


def execute(arguments: list[str]) -> None:
    """Do what ``python *arguments`` does; of the interpreter's options ``-W ignore`` is known."""
    if arguments[:2] == ["-W", "ignore"] or os.environ.get("PYTHONWARNINGS") == "ignore":
        # As at the start of an interpreter: what libraries ask for comes first.
        warnings.simplefilter("ignore", append=True)
        arguments = arguments[2:] if arguments[0] == "-W" else arguments
    sys.path.pop(0)  # the folder of this file
    kind, *rest = arguments
    if kind == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        # It is no accident that the module is known already.
        warnings.filterwarnings("ignore", message=".*found in sys.modules", module="runpy")
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


def finish(arguments: list[str]) -> NoReturn:
    """Execute, and end with the exit code that the interpreter would give, without taking its modules to pieces."""
    code = 0
    try:
        execute(arguments)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
        code = -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
        code = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def fork_what_is_spawned() -> None:
    """Let processes that `multiprocessing` spawns from now on be forks of this one, which has done the imports.

    All else is as it is for spawned ones: what they are given is pickled and sent, and they are the same children.
    """

    def fork(path: bytes, arguments: list[str], descriptors: list[int]) -> int:
        child = os.fork()
        if child:
            return child
        finish(list(map(os.fsdecode, arguments[arguments.index("-c") :])))

    multiprocessing.util.spawnv_passfds = fork


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest
    channel = Connection(int(sys.argv[1]))
    preload()
    gc.collect()
    gc.freeze()
    channel.send("ready")
    command = serve(channel)
    become(command)
    finish(command["arguments"])
