"""Functions in turns: each in a thread of its own, one at a time, with random numbers of its own.

A run of a Trainer cannot be left in the middle and entered again, but its thread can wait. So arms take turns by code
that knows nothing of other arms, and what each of them computes is what it would compute alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_lora.study.bank.process_state import ProcessState


class Seat:
    """The place of one function among those that take turns."""

    def __init__(self, name: str, turns: Turns) -> None:
        self.name = name
        self.turns = turns
        self.thread: threading.Thread | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_over = False
        # What it waits for together with others; None: it could go on.
        self.waits_for: Any = None
        # Called with a signal number when the process is told to stop; returns whether the function will end by itself.
        self.stop: Callable[[int], bool] | None = None
        self._turn = threading.Event()
        self._state: ProcessState | None = ProcessState()
        self._seconds = 0.0
        self._since: float | None = None

    def pass_turn(self) -> None:
        """Let the others have their turns, and come back.

        Raises:
            SystemExit: If the process was told to stop.
        """
        turns = self.turns
        following = turns.following(self)
        if following is not self:
            self._leave()
            following.enter()
            self._wait()
        if turns.ending is not None and not (self.stop is not None and self.stop(turns.ending)):
            raise SystemExit(128 + turns.ending)

    def meet(self, waits_for: Any, serve: Callable[[Sequence[Seat]], None]) -> None:
        """Wait until every function waits or is over; then one of them serves all that wait.

        Args:
            waits_for: What this function brings; `waits_for` of its seat until it is served.
            serve: Called in one of the threads with the seats that wait; those that it has served have ``waits_for``
                None.
        """
        self.waits_for = waits_for
        while self.waits_for is not None:
            following = self.turns.following(self)
            if following is not self:
                self._leave()
                following.enter()
                self._wait()
            if self.waits_for is not None:
                serve([seat for seat in self.turns.seats if seat.waits_for is not None])

    @property
    def has_turn(self) -> bool:
        """Whether it is the one that runs."""
        return self._since is not None

    def seconds(self) -> float:
        """Seconds for which it had its turn, up to now."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def charge(self, seconds: float) -> None:
        """Count work that another function has done for this one; negative: that this one has done for others."""
        self._seconds += seconds

    def enter(self) -> None:
        """Give it the turn."""
        self._turn.set()

    def run(self, function: Callable[[Seat], Any]) -> None:
        """Run the function in this thread, from its first turn on."""
        self._wait()
        try:
            self.result = function(self)
        except BaseException as error:  # whatever ends one function, the others go on
            self.error = error
        self.is_over = True
        self._leave()
        self.turns.over(self)

    def _leave(self) -> None:
        self._state = ProcessState()
        self._seconds, self._since = self.seconds(), None

    def _wait(self) -> None:
        self._turn.wait()
        self._turn.clear()
        assert self._state is not None
        self._state.restore()
        self._since = time.perf_counter()


class Turns:
    """Runs functions in turns until all are over.

    A signal that ends the process reaches each function through `Seat.stop`, as Python delivers signals to the main
    thread only.
    """

    def __init__(self) -> None:
        self.seats: list[Seat] = []
        # The signal by which the process was told to stop.
        self.ending: int | None = None
        self._all_over = threading.Event()

    def run(self, functions: Mapping[str, Callable[[Seat], Any]]) -> list[Seat]:
        """Run them all; returns their seats, each with a result or an error.

        Args:
            functions: Name to function, which is called with its seat.

        Raises:
            SystemExit: If the process was told to stop; every function has ended before.
        """
        before = ProcessState()
        self.seats = [Seat(name, self) for name in functions]
        for seat, function in zip(self.seats, functions.values(), strict=True):
            seat.thread = threading.Thread(target=seat.run, args=(function,), name=seat.name, daemon=True)
            seat.thread.start()
        try:
            if self.seats:
                self.seats[0].enter()
                self._wait_for_all()
        finally:
            before.restore()
        return self.seats

    def following(self, seat: Seat) -> Seat:
        """Whose turn it is after a seat: the next one that can go on, else the next one that waits for all."""
        place = self.seats.index(seat)
        others = [*self.seats[place + 1 :], *self.seats[: place + 1]]
        there = [other for other in others if not other.is_over]
        free = [other for other in there if other.waits_for is None]
        return (free or there or [seat])[0]

    def over(self, seat: Seat) -> None:
        """Give the turn away for good."""
        following = self.following(seat)
        if following.is_over:
            self._all_over.set()
        else:
            following.enter()

    def _wait_for_all(self) -> None:
        while not self._all_over.is_set():
            try:
                self._all_over.wait()
            except (KeyboardInterrupt, SystemExit) as stop:
                signum = 2 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0) - 128
                if self.ending is not None or signum <= 0:
                    raise  # the second time, or by an error: at once
                self.ending = signum
                for seat in self.seats:
                    if seat.stop is not None:
                        seat.stop(signum)
        for seat in self.seats:
            assert seat.thread is not None
            seat.thread.join()
        if self.ending is not None:
            raise SystemExit(128 + self.ending)
