"""Rewards in processes of their own: one that hangs or crashes stops neither the run nor the other rows."""

from __future__ import annotations

import pickle
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import nn

from lightning_lora.errors import RewardError, RewardSettingError, check_count
from lightning_lora.tasks.rl.rewards.own_precision import own_precision
from lightning_lora.tasks.rl.rewards.process import Process
from lightning_lora.tasks.rl.rewards.worker import Answer, Call, Reward, answer

_SHARES = 4
"""Parts of a batch for each worker: what a slow one leaves, the others take."""


def is_called_here(reward: object) -> bool:
    """Whether a reward is called in this process with the whole batch, however many workers there are."""
    return bool(getattr(reward, "sees_all_rows", False)) or isinstance(reward, nn.Module)


class RewardPool:
    """Calls a reward in worker processes, a few rows at a time, each call within a time limit.

    The processes are new interpreters that start with the first batch and stay. They import the module of the reward; a
    function of a notebook or of the script that runs is sent to them. A reward that is a ``nn.Module``, or has an
    attribute ``sees_all_rows`` that is true, as `ModelReward`, is called in this process with the whole batch.

    In this process a reward is called without gradients and autocast, whatever the precision of the Trainer.

    Args:
        reward: ``reward(prompts, completions, **columns) -> rewards``, each argument a list with an entry per row.
        workers: Number of processes. 0 calls the reward in this process, without a time limit: for a reward that uses
            a GPU.
        timeout: Seconds of one call at most; None sets no limit. A worker that takes longer is killed, and a new one
            is started.
        rows_per_call: Rows that the reward sees at once; None gives it the whole batch, for a reward that compares
            rows or scores many in one go.
        on_timeout: Reward of the rows of a call that took too long. None raises an error, as for every other fault.

    Raises:
        ConfigError: If a setting is out of its range, or the reward cannot be sent to another process.
    """

    def __init__(
        self,
        reward: Reward,
        workers: int = 2,
        timeout: float | None = 10.0,
        rows_per_call: int | None = 1,
        on_timeout: float | None = None,
    ) -> None:
        if not callable(reward):
            raise RewardSettingError(f"a reward is a function of prompts and completions, got {reward!r}.")
        check_count("workers", workers, RewardSettingError, least=0)
        check_count("rows_per_call", rows_per_call, RewardSettingError, optional=True)
        if timeout is not None and not timeout > 0:
            raise RewardSettingError(f"timeout must be above 0, got {timeout}.")
        if is_called_here(reward):
            workers, rows_per_call = 0, None
        self.reward, self.name = reward, getattr(reward, "__name__", type(reward).__name__)
        self.timeout, self.rows_per_call, self.on_timeout = timeout, rows_per_call, on_timeout
        self._pickled = _pickled(reward, self.name) if workers else b""
        self._workers = workers
        self._processes: list[Process] = []
        # A list of its own, because the finalizer must not hold the pool.
        weakref.finalize(self, _kill_all, self._processes)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> list[float]:
        """Rewards of rows, in order.

        Args:
            prompts: A text or a list of messages for each row.
            completions: A text or a list of messages for each row.
            columns: What else the reward is given, an entry for each row.

        Raises:
            RewardError: If the reward fails on a row, after all others were scored: it raises, takes too long, or
                returns something else than one finite number for each row.
        """
        calls = self._calls(list(prompts), list(completions), {name: list(rows) for name, rows in columns.items()})
        answers = self._ask(calls) if self._workers else self._answer(calls)
        rewards: list[float] = []
        faults: list[tuple[int, str]] = []
        for call, found in zip(calls, answers, strict=True):
            if found is None and self.on_timeout is not None:
                found = [self.on_timeout] * len(call.prompts)
            elif found is None:
                found = 0, f"took more than {self.timeout:g} seconds"
            if isinstance(found, tuple):
                faults.append((len(rewards) + found[0], found[1]))
                found = [float("nan")] * len(call.prompts)
            rewards += found
        if faults:
            raise RewardError(self._told(faults, prompts, completions))
        return rewards

    def start(self) -> None:
        """Start the processes that are missing, and wait until each has loaded the reward.

        The first batch starts them too, and waits for one of them only.
        """
        self._fill()
        while not all(process.ready for process in self._processes):
            self._receive({}, deque())

    def place(self, device: torch.device) -> None:
        """Move a reward that is a ``nn.Module`` to a device, in eval mode."""
        if isinstance(self.reward, nn.Module):
            self.reward.eval().to(device)

    def _fill(self) -> None:
        while len(self._processes) < self._workers:
            self._processes.append(Process(self._pickled, self.timeout))

    def close(self) -> None:
        """End the processes; the next batch starts new ones."""
        _kill_all(self._processes)

    def _calls(self, prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]) -> list[Call]:
        lengths = {"prompts": len(prompts), "completions": len(completions)}
        lengths |= {name: len(rows) for name, rows in columns.items()}
        if len(set(lengths.values())) > 1:
            raise RewardSettingError(f"reward {self.name}: not an entry for each row in every list: {lengths}.")
        size = self.rows_per_call or max(1, len(prompts))
        return [
            Call(prompts[rows], completions[rows], {name: values[rows] for name, values in columns.items()})
            for rows in (slice(start, start + size) for start in range(0, len(prompts), size))
        ]

    def _answer(self, calls: list[Call]) -> list[Answer | None]:
        """The answer of this process to each call."""
        with own_precision():
            return [answer(self.reward, call) for call in calls]

    def _ask(self, calls: list[Call]) -> list[Answer | None]:
        """The answer to each call; None where it took too long."""
        answers: dict[int, Answer | None] = {}
        share = -(-len(calls) // (_SHARES * self._workers)) or 1
        waiting = deque(list(range(start, len(calls)))[:share] for start in range(0, len(calls), share))
        self._fill()
        try:
            while len(answers) < len(calls):
                for process in self._processes:
                    if waiting and process.ready and not process.pending:
                        numbers = waiting.popleft()
                        process.send(numbers, [calls[number] for number in numbers])
                self._receive(answers, waiting)
        except BaseException:
            self.close()  # none is left with an answer that the next batch would take for its own
            raise
        return [answers[number] for number in range(len(calls))]

    def _receive(self, answers: dict[int, Answer | None], waiting: deque[list[int]]) -> None:
        """Take what has come, and replace processes that have ended or hang."""
        least = max(0.0, min(process.seconds_left() for process in self._processes))
        outputs = [process.fileno() for process in self._processes]
        heard = wait(outputs, None if least == float("inf") else least)
        for process in list(self._processes):
            found = self._heard(process) if process.fileno() in heard else []
            answers.update(found or ())
            if found is not None and process.seconds_left() > 0:
                continue
            fault = None if found is not None else (0, process.how_it_ended())
            process.kill()
            self._processes.remove(process)
            if process.pending:
                answers[process.pending[0]] = fault
            if len(process.pending) > 1:
                waiting.append(process.pending[1:])
        self._fill()

    def _heard(self, process: Process) -> list[tuple[int, Answer]] | None:
        try:
            found = process.receive()
        except ImportError as error:
            raise RewardSettingError(f"reward {self.name} cannot be loaded in another process: {error}") from None
        if found is None and not process.ready:
            raise RewardError(f"reward {self.name} {process.how_it_ended()} before it was called.")
        return found

    def _told(self, faults: list[tuple[int, str]], prompts: Sequence[Any], completions: Sequence[Any]) -> str:
        row, fault = faults[0]
        more = f" {len(faults) - 1} more calls failed." if len(faults) > 1 else ""
        return (
            f"reward {self.name}, row {row}: {fault}.{more} "
            f"The prompt: {_short(prompts[row])}; the completion: {_short(completions[row])}"
        )


def _kill_all(processes: list[Process]) -> None:
    while processes:
        processes.pop().kill()


def _pickled(reward: Reward, name: str) -> bytes:
    try:
        written = pickle.dumps(reward)
        if getattr(reward, "__module__", None) != "__main__" and type(reward).__module__ != "__main__":
            return written
    except (pickle.PicklingError, AttributeError, TypeError):
        pass  # dill sends the code itself
    import dill  # `datasets` brings it

    try:
        return dill.dumps(reward, recurse=True)
    except Exception as error:
        raise RewardSettingError(
            f"reward {name} cannot be sent to another process: {error}. Write it as a function of a module, or set "
            "workers to 0."
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"
