"""Processes that do parts of a work, with the results in order.

They are new interpreters, not forks: a fork inherits locks that threads of the tokenizer may hold, and processes made
by `multiprocessing` run the user's script again, which must then be guarded by ``if __name__ == "__main__"``.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from lightning_lora.errors import DataError, LoRAError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], num_proc: int) -> Iterator[Result]:
    """Apply a function to items in ``num_proc`` processes; 1 is this process.

    At most two items per process are read ahead of the result that is used.

    Args:
        function: An object that can be pickled, of a module that can be imported.
        items: What it is applied to.
        num_proc: Number of processes.

    Yields:
        The results, in the order of the items.

    Raises:
        DataError: If a process ends before it has answered.
    """
    if num_proc == 1:
        yield from map(function, items)
        return
    processes = [_Process(function) for _ in range(num_proc)]
    free: SimpleQueue[_Process] = SimpleQueue()
    for process in processes:
        free.put(process)

    def answer(item: Item) -> Any:
        process = free.get()
        try:
            return process.ask(item)
        finally:
            free.put(process)

    threads = ThreadPoolExecutor(num_proc, thread_name_prefix="tokenise")  # they only wait for the processes
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(threads.submit(answer, item))
            if len(pending) == 2 * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)


class _Process:
    """A process that applies a function to what it is sent. It ends when its input is closed."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        start = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _serve; _serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Its threads would compete with those of the other processes for the same cores.
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for the process that waits, which ends this one
        )
        self.function: Callable[[Any], Any] | None = function

    def ask(self, item: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            if self.function is not None:
                pickle.dump(self.function, self.process.stdin)
                self.function = None
            pickle.dump(item, self.process.stdin)
            self.process.stdin.flush()
            result = pickle.load(self.process.stdout)  # of our own process
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            code = self.process.wait()
            how = (
                f"was killed by signal {-code}; was there too little memory?"
                if code < 0
                else f"ended with code {code}."
            )
            raise DataError(f"a process that tokenises {how} Set num_proc to a smaller number.") from error
        if isinstance(result, _Failure):
            raise result.error
        return result

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


class _Failure:
    def __init__(self, error: Exception) -> None:
        # Errors of libraries may not survive pickling; their text does.
        self.error = error if isinstance(error, LoRAError) else RuntimeError("".join(traceback.format_exception(error)))


def _serve() -> None:
    """Answer until the input ends; this runs in the new process."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not print into an answer
    with suppress(EOFError, BrokenPipeError):
        function = pickle.load(questions)
        while True:
            item = pickle.load(questions)
            try:
                result = function(item)
            except Exception as error:
                result = _Failure(error)
            pickle.dump(result, answers)
            answers.flush()
